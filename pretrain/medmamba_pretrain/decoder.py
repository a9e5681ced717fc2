"""The decoder of pretraining: from features whose masked positions are filled, back to an image. It is thrown away."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmamba.layers import ConvBlock, conv, conv_transpose

_FEWEST = 8


class ReconstructionDecoder(nn.Module):
    """Upsampling, addition of the projected skip and one convolution block per scale, down to ``finest``.

    From the finest scale it works at, a 1^n convolution predicts all voxels that a position stands for. So it needs no
    scale that the encoder does not have, such as those above a patch embedding, and full resolution, which costs most,
    can be left out.

    Args:
        channels: of the features, finest scale first.
        strides: voxels that a position of each scale stands for, per axis.
        image_channels: of the image.
        share: widths over ``channels``, but at least 8.
        finest: first scale to work at.
        reads_all_scales: whether the features of finer scales than the coarsest are read.

    Raises:
        ValueError: ``finest`` is not a scale.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        image_channels: int,
        *,
        share: float = 0.5,
        finest: int = 0,
        reads_all_scales: bool = True,
    ):
        super().__init__()
        if not 0 <= finest < len(channels):
            raise ValueError(f"the decoder's finest scale must lie in 0..{len(channels) - 1}, got {finest}")
        channels, self.strides = list(channels[finest:]), [tuple(stride) for stride in strides[finest:]]
        self.finest, ndim = finest, len(self.strides[0])
        widths = [max(_FEWEST, round(share * width)) for width in channels]
        steps = [
            [below // above for below, above in zip(coarse, fine, strict=True)]
            for fine, coarse in zip(self.strides, self.strides[1:], strict=False)
        ]
        self.bottom = conv(channels[-1], widths[-1], [1] * ndim)
        self.ups = nn.ModuleList(conv_transpose(widths[i + 1], widths[i], step) for i, step in enumerate(steps))
        self.skips = (
            nn.ModuleList(conv(wide, width, [1] * ndim) for wide, width in zip(channels[:-1], widths, strict=False))
            if reads_all_scales
            else None
        )
        self.blocks = nn.ModuleList(ConvBlock(width, width, [3] * ndim) for width in widths[:-1])
        self.head = conv(widths[0], image_channels * math.prod(self.strides[0]), [1] * ndim)

    @property
    def reads(self) -> range:
        """Which of the encoder's features are read, by their number from the finest."""
        last = self.finest + len(self.strides) - 1
        return range(self.finest if self.skips is not None else last, last + 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, image, *spatial) from the features that :attr:`reads` names, (B, C, *grid) each, finest first."""
        x = self.bottom(features[-1])
        for level in reversed(range(len(self.ups))):
            x = self.ups[level](x)
            if self.skips is not None:
                x = x + self.skips[level](features[level])
            x = self.blocks[level](x)
        return depth_to_space(self.head(x), self.strides[0])


def depth_to_space(x: Tensor, stride: Sequence[int]) -> Tensor:
    """(B, C * prod(stride), *grid) -> (B, C, *(grid * stride)): channels become the voxels of their position."""
    if math.prod(stride) == 1:
        return x
    grid = x.shape[2:]
    x = x.unflatten(1, (-1, *stride))
    inner = range(2, 2 + len(stride))
    outer = range(2 + len(stride), 2 + 2 * len(stride))
    x = x.permute(0, 1, *(axis for pair in zip(outer, inner, strict=True) for axis in pair))
    return x.reshape(x.shape[0], x.shape[1], *(size * step for size, step in zip(grid, stride, strict=True)))


@torch.no_grad()
def scales_of(
    encoder: nn.Module, total_stride: Sequence[int], channels: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Channels and strides of an encoder's features, finest first, by running it on the smallest image it takes.

    Args:
        encoder: ``encoder(x)`` gives a list of (B, C, *spatial).
        total_stride: of its coarsest grid.
        channels: of its image.
    """
    was_training = encoder.training
    like = next(encoder.parameters())
    size = [2 * stride for stride in total_stride]
    features = encoder.eval()(torch.zeros(1, channels, *size, dtype=like.dtype, device=like.device))
    encoder.train(was_training)
    strides = [
        tuple(whole // part for whole, part in zip(size, feature.shape[2:], strict=True)) for feature in features
    ]
    return [feature.shape[1] for feature in features], strides
