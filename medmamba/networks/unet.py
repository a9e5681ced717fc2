"""The U-shaped skeleton: it takes parts, knows no paper and has no flags.

Features travel as (B, C, *spatial). The contract with nnU-Net: ``net.decoder.deep_supervision`` can be switched,
heads live under ``decoder.seg_layers`` and are always built, and with deep supervision the result is a list,
finest first, one entry per stage except the deepest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmamba.layers import conv


class Encoder(nn.Module):
    """Stem, then stages with a downsampling in front of each but the first.

    Args:
        stem: image (B, in, *spatial) to the first stage's width, at full resolution.
        stages: one module per resolution, finest first.
        downs: ``len(stages) - 1`` modules, ``downs[i]`` leads from stage i to stage i + 1.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], downs: Sequence[nn.Module]):
        super().__init__()
        if len(downs) != len(stages) - 1:
            raise ValueError(f"{len(stages)} stages need {len(stages) - 1} downsamplings, got {len(downs)}")
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.downs = nn.ModuleList(downs)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all stages, finest first."""
        x = self.stages[0](self.stem(x))
        features = [x]
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            x = stage(down(x))
            features.append(x)
        return features


class AddSkip(nn.Module):
    """Joins the upsampled feature with the encoder's by addition."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip


class ConcatSkip(nn.Module):
    """Concatenates (upsampled, skip) and projects back to the width of one: a 1^n convolution with bias.

    Args:
        width: channels of either.
        ndim: spatial axes.
    """

    def __init__(self, width: int, ndim: int):
        super().__init__()
        self.project = conv(2 * width, width, [1] * ndim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.project(torch.cat([x, skip], dim=1))


class NoSkip(nn.Module):
    """The upsampled feature alone, for a level whose skip a network does not use."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x


class Decoder(nn.Module):
    """Upsampling, fusion with the skip, stage; one head per level.

    Every list is ordered finest level first and has one entry per encoder stage except the deepest.

    Args:
        ups: ``ups[i]`` leads from level i + 1 to level i.
        fuses: ``fuses[i](upsampled, skip)``.
        stages: blocks of level i, after the fusion.
        seg_layers: 1x1 heads to class logits; fewer than levels if only the finest ones have a head.
        deep_supervision: return all levels' logits (finest first) instead of the finest only.
    """

    def __init__(
        self,
        ups: Sequence[nn.Module],
        fuses: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        seg_layers: Sequence[nn.Module],
        *,
        deep_supervision: bool,
    ):
        super().__init__()
        if not len(ups) == len(fuses) == len(stages) >= len(seg_layers) >= 1:
            counts = f"{len(ups)}, {len(fuses)}, {len(stages)}, {len(seg_layers)}"
            raise ValueError(f"ups, fuses and stages must be equally many, seg_layers 1 up to as many, got {counts}")
        self.ups = nn.ModuleList(ups)
        self.fuses = nn.ModuleList(fuses)
        self.stages = nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(seg_layers)
        self.deep_supervision = deep_supervision

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Logits from the encoder's features (finest first)."""
        x = features[-1]
        logits: list[Tensor] = []
        for level in reversed(range(len(self.stages))):
            x = self.stages[level](self.fuses[level](self.ups[level](x), features[level]))
            if level == 0 or (self.deep_supervision and level < len(self.seg_layers)):
                logits.append(self.seg_layers[level](x))
        return logits[::-1] if self.deep_supervision else logits[-1]


class UNet(nn.Module):
    """Encoder and decoder; refuses inputs that the strides do not divide.

    Args:
        encoder: returns a list of features.
        decoder: maps that list to logits; has ``deep_supervision``.
        strides: per stage, per axis, as in nnU-Net's plans.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, strides: Sequence[Sequence[int]]):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.total_stride = total_strides(strides)[-1]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, in, *spatial) -> logits (B, classes, *spatial), or a list of them with deep supervision."""
        check_divisible(x.shape[2:], self.total_stride)
        return self.decoder(self.encoder(x))


def total_strides(strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Cumulative stride of every stage per axis, from nnU-Net's per-stage strides.

    Raises:
        ValueError: strides that nnU-Net's plans never have (unequal dimensions, a first stage that is not 1).
    """
    ndim = len(strides[0])
    if ndim not in (2, 3) or any(len(s) != ndim for s in strides):
        raise ValueError(f"strides must all have 2 or all have 3 entries, got {[list(s) for s in strides]}")
    if any(s != 1 for s in strides[0]):
        raise ValueError(f"the first stage works at full resolution: strides[0] must be ones, got {list(strides[0])}")
    if len(strides) < 2:
        raise ValueError("a U-shaped network needs at least two stages, got one entry in strides")
    return [tuple(math.prod(s[axis] for s in strides[: i + 1]) for axis in range(ndim)) for i in range(len(strides))]


def check_divisible(spatial: Sequence[int], total_stride: Sequence[int]) -> None:
    """ValueError unless every axis is divisible by the total stride; the text names sizes that fit."""
    if len(spatial) != len(total_stride):
        raise ValueError(
            f"input has {len(spatial)} spatial axes {tuple(spatial)} but the network was built for {len(total_stride)}"
        )
    if any(size % stride for size, stride in zip(spatial, total_stride, strict=True)):
        fits = tuple(-(-size // stride) * stride for size, stride in zip(spatial, total_stride, strict=True))
        raise ValueError(
            f"input of size {tuple(spatial)} is not divisible by the network's total stride {tuple(total_stride)}; "
            f"pad it to {fits} or choose a plan with fewer stages"
        )
