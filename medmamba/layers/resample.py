"""Patch embedding, merging and expanding, with one factor per axis, in 2D and 3D.

All work on channels-last tensors (B, *spatial, C). On images the patch layers equal those of VM-UNet (Ruan & Xiang,
2024, arXiv:2402.02491), which takes them from Swin-UNet (Cao et al., 2021, arXiv:2105.05537), and the two with
convolutions those of MSVM-UNet (Chen et al., 2024, arXiv:2408.13735).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import BATCH_NORM, CONV, conv

#: Norms inside :class:`LargeKernelExpand`; the published one is "batch".
EXPAND_NORMS = ("instance", "batch")


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
        return self.norm(sub_pixel_shuffle(self.expand(x), self.stride))


def sub_pixel_shuffle(x: Tensor, stride: Sequence[int]) -> Tensor:
    """(B, *spatial, prod(stride) * C) -> (B, *spatial * stride, C), channels ordered (p_d, p_h, p_w, c)."""
    batch, *spatial, _ = x.shape
    ndim = len(spatial)
    pairs = [axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i)]
    sizes = [size * s for size, s in zip(spatial, stride, strict=True)]
    return x.reshape(batch, *spatial, *stride, -1).permute(0, *pairs, 1 + 2 * ndim).reshape(batch, *sizes, -1)


class ConvDown(nn.Module):
    """Strided convolution, then LayerNorm: downsampling by ``stride``.

    (B, *spatial, in) -> (B, *spatial / stride, out).

    Args:
        in_channels: in.
        out_channels: out.
        stride: per axis.
        kernel_size: per axis, odd.

    Source: the stem and the downsampling of VMamba v2 (Liu et al., 2024, arXiv:2401.10166).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int], kernel_size: Sequence[int]):
        super().__init__()
        self.proj = conv(in_channels, out_channels, kernel_size, stride=stride)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.movedim(-1, 1)).movedim(1, -1))


class LargeKernelExpand(nn.Module):
    """Large kernel patch expanding (LKPE): a depthwise convolution between the expansion and the shuffle.

    1^n convolution to prod(stride) * out channels, norm, ReLU, depthwise convolution, shuffle, LayerNorm over out.
    (B, *spatial, in) -> (B, *spatial * stride, out). Channels are ordered as in :class:`PatchExpand`.

    Args:
        in_channels: in.
        out_channels: out.
        stride: per axis.
        kernel_size: of the depthwise convolution on the coarse grid, per axis, odd.
        norm: "instance", or "batch" as published (nnU-Net's batches of two are small for its statistics).

    Raises:
        ValueError: an unknown norm.

    Source: Chen et al., "MSVM-UNet", 2024, arXiv:2408.13735 (LKPE; FLKPE is the same with stride 4).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Sequence[int],
        kernel_size: Sequence[int],
        *,
        norm: str = "instance",
    ):
        super().__init__()
        if norm not in EXPAND_NORMS:
            raise ValueError(f"unknown norm {norm!r} of the expansion; known: {', '.join(EXPAND_NORMS)}")
        self.stride = tuple(stride)
        expanded = out_channels * math.prod(self.stride)
        self.conv = conv(in_channels, expanded, [1] * len(self.stride))
        self.expand_norm = BATCH_NORM[len(self.stride)](expanded) if norm == "batch" else _InstanceNorm(expanded)
        self.act = nn.ReLU()
        self.depthwise = conv(expanded, expanded, kernel_size, groups=expanded)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.act(self.expand_norm(self.conv(x.movedim(-1, 1)))))
        return self.norm(sub_pixel_shuffle(x.movedim(1, -1), self.stride))


class _InstanceNorm(nn.Module):
    """InstanceNorm with affine, eps 1e-5, for any number of axes.

    A grid of one voxel has no statistics: normalising would erase it (and torch refuses to), so it is only scaled
    and shifted. The bottom of a deep plan on a small patch is such a grid.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if math.prod(x.shape[2:]) > 1:
            return F.instance_norm(x, weight=self.weight, bias=self.bias)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.weight.view(shape) + self.bias.view(shape)
