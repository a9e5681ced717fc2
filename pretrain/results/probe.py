"""A linear probe: one 1x1 layer on the features of a frozen encoder.

What it segments, the encoder has already separated. The features of all scales are standardised per channel, upsampled
to the finest grid and concatenated; the layer on top gives the logits. Upsampling and a linear layer commute, so each
scale has a layer of its own and the logits are upsampled, which costs a tenth and is the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

#: nnU-Net's smoothing of the Dice loss.
_SMOOTH = 1e-5
#: Standard deviation below which a channel counts as constant: it is left as it is.
_CONSTANT = 1e-6


class Standardise(nn.Module):
    """(B, C, *spatial) minus a mean, over a standard deviation, per channel; both measured once.

    Args:
        width: C.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    @torch.no_grad()
    def measure(self, features: Sequence[Tensor]) -> None:
        """Take mean and standard deviation from (B, C, *spatial) features of any number."""
        values = torch.cat([feature.movedim(1, 0).flatten(1) for feature in features], 1)
        deviation = values.std(1)
        self.mean.copy_(values.mean(1))
        self.deviation.copy_(torch.where(deviation > _CONSTANT, deviation, 1))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.deviation.view(shape)


class LinearProbe(nn.Module):
    """(B, C, *spatial) -> logits (B, classes, *spatial).

    Args:
        encoder: ``encoder(x)`` gives features (B, C, *spatial), finest first; the finest has the grid of the image. It
            is put into eval mode, gets no gradient and is never changed.
        classes: including background.
        image: (1, C, *spatial), any image that the encoder takes; only the widths of its features are looked at.
    """

    def __init__(self, encoder: nn.Module, classes: int, image: Tensor):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        widths = [feature.shape[1] for feature in self.features(image)]
        self.scalings = nn.ModuleList(Standardise(width) for width in widths)
        self.heads = nn.ModuleList(nn.Conv3d(width, classes, 1, bias=i == 0) for i, width in enumerate(widths))
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def train(self, mode: bool = True) -> LinearProbe:
        """As ever, but the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, image: Tensor) -> list[Tensor]:
        """Features of the frozen encoder, finest first."""
        return list(self.encoder(image))

    def classify(self, features: Sequence[Tensor]) -> Tensor:
        """Logits at the grid of the finest features."""
        size = features[0].shape[2:]
        parts = zip(self.heads, self.scalings, features, strict=True)
        logits = [
            functional.interpolate(head(scaling(feature)), size=size, mode="trilinear")
            for head, scaling, feature in parts
        ]
        return torch.stack(logits).sum(0)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.features(image))


@dataclass(frozen=True)
class Fit:
    """How a probe is trained.

    Attributes:
        crops: number of crops, drawn once; their features are computed once.
        steps: of Adam.
        batch_size: crops per step.
        lr: learning rate, which falls to 0 along a cosine.
    """

    crops: int = 60
    steps: int = 200
    batch_size: int = 2
    lr: float = 0.03


def fit(probe: LinearProbe, images: NDArray[np.float32], labels: NDArray[np.int64], how: Fit, seed: int) -> None:
    """Train the layers of a probe with cross-entropy and soft Dice.

    Args:
        probe: its encoder stays as it is.
        images: (N, C, D, H, W) crops.
        labels: (N, D, H, W), 0 for background.
        how: steps, batch and learning rate.
        seed: of the order of the crops.
    """
    crops = [probe.features(torch.from_numpy(image)[None]) for image in images]
    for scaling, features in zip(probe.scalings, zip(*crops, strict=True), strict=True):
        scaling.measure(features)
    classes = probe.heads[0].out_channels
    optimizer = torch.optim.Adam(probe.heads.parameters(), lr=how.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    generator = np.random.default_rng(seed)
    for _ in range(how.steps):
        chosen = generator.choice(len(crops), how.batch_size, replace=False)
        logits = probe.classify([torch.cat(scale) for scale in zip(*(crops[i] for i in chosen), strict=True)])
        loss = segmentation_loss(logits, torch.from_numpy(labels[chosen]), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def segmentation_loss(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Cross-entropy minus the mean soft Dice of the foreground classes, over the whole batch.

    Args:
        logits: (B, classes, *spatial).
        labels: (B, *spatial) int64.
        classes: including background.
    """
    probabilities = logits.softmax(1)
    truth = functional.one_hot(labels, classes).movedim(-1, 1).to(probabilities.dtype)
    axes = (0, *range(2, logits.dim()))
    overlap, total = (probabilities * truth).sum(axes), (probabilities + truth).sum(axes)
    dice = (2 * overlap + _SMOOTH) / (total + _SMOOTH)
    return functional.cross_entropy(logits, labels) - dice[1:].mean()


def draw_crops(
    images: Sequence[NDArray[np.float32]],
    labels: Sequence[NDArray[np.integer]],
    size: Sequence[int],
    count: int,
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Crops of some cases in turn, every other one around a voxel of a random structure of its case.

    Beyond the border of an image both are 0, as in nnU-Net's prediction.

    Args:
        images: (C, D, H, W) each.
        labels: (D, H, W) each; negative values count as background.
        size: of the crops, D, H, W.
        count: of the crops.
        seed: of their places.

    Returns:
        (count, C, *size) float32 and (count, *size) int64.
    """
    generator = np.random.default_rng(seed)
    crops = []
    for number in range(count):
        case = number % len(images)
        image, label = images[case], np.maximum(labels[case], 0)
        start = [
            int(generator.integers(min(0, n - s), max(0, n - s) + 1)) for n, s in zip(label.shape, size, strict=True)
        ]
        structures = np.unique(label)[1:]
        if (number // len(images)) % 2 and len(structures):
            voxels = np.argwhere(label == generator.choice(structures))
            centre = voxels[generator.integers(len(voxels))]
            start = [
                int(np.clip(c - s // 2, min(0, n - s), max(0, n - s)))
                for c, s, n in zip(centre, size, label.shape, strict=True)
            ]
        crops.append(_crop(image, label, start, size))
    return np.stack([image for image, _ in crops]), np.stack([label for _, label in crops])


def _crop(
    image: NDArray[np.float32], label: NDArray[np.integer], start: Sequence[int], size: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    around = [(max(0, -at), max(0, at + s - n)) for at, s, n in zip(start, size, label.shape, strict=True)]
    box = tuple(slice(at + before, at + before + s) for at, s, (before, _) in zip(start, size, around, strict=True))
    image, label = np.pad(image, [(0, 0), *around]), np.pad(label, around)
    return image[(slice(None), *box)].astype(np.float32), label[box].astype(np.int64)
