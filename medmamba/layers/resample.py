"""Patch embedding, merging and expanding, with one factor per axis, in 2D and 3D.

All work on channels-last tensors (B, *spatial, C). On images they equal the layers of VM-UNet (Ruan & Xiang,
2024, arXiv:2402.02491), which takes them from Swin-UNet (Cao et al., 2021, arXiv:2105.05537).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .convolution import CONV


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: a convolution whose kernel is its stride, then LayerNorm.

    (B, *spatial, in) -> (B, *spatial / stride, out).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]):
        super().__init__()
        self.proj = CONV[len(stride)](in_channels, out_channels, tuple(stride), stride=tuple(stride))
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.movedim(-1, 1)).movedim(1, -1))


class PatchMerge(nn.Module):
    """Concatenate the neighbours of a ``stride`` window, LayerNorm, Linear without bias.

    (B, *spatial, in) -> (B, *spatial / stride, out). The neighbours' channel blocks are ordered with the row
    offset fastest, then the column, then the depth, so that a depth-1 volume gives VM-UNet's order
    (row, column) = 00, 10, 01, 11.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]):
        super().__init__()
        self.stride = tuple(stride)
        merged = in_channels * math.prod(self.stride)
        self.norm = nn.LayerNorm(merged)
        self.reduction = nn.Linear(merged, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self._gather(x)))

    def _gather(self, x: Tensor) -> Tensor:
        batch, *spatial, channels = x.shape
        ndim = len(spatial)
        sizes = [size // s for size, s in zip(spatial, self.stride, strict=True)]
        split = [n for pair in zip(sizes, self.stride, strict=True) for n in pair]
        x = x.reshape(batch, *split, channels)
        outer = [1 + 2 * axis for axis in range(ndim)]
        # Offsets: depth (if any) slowest, then column, then row.
        inner = [2 + 2 * axis for axis in [*range(ndim - 2), ndim - 1, ndim - 2]]
        return x.permute(0, *outer, *inner, 1 + 2 * ndim).reshape(batch, *sizes, -1)


class PatchExpand(nn.Module):
    """Linear without bias, sub-pixel shuffle, LayerNorm: upsampling by ``stride``.

    (B, *spatial, in) -> (B, *spatial * stride, out). The Linear's outputs are ordered (p_d, p_h, p_w, c), channel
    fastest: the opposite of torch's PixelShuffle.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]):
        super().__init__()
        self.stride = tuple(stride)
        self.expand = nn.Linear(in_channels, out_channels * math.prod(self.stride), bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, *spatial, _ = x.shape
        ndim = len(spatial)
        x = self.expand(x).reshape(batch, *spatial, *self.stride, -1)
        pairs = [axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i)]
        sizes = [size * s for size, s in zip(spatial, self.stride, strict=True)]
        return self.norm(x.permute(0, *pairs, 1 + 2 * ndim).reshape(batch, *sizes, -1))
