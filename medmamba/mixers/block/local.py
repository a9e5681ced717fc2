"""Convolutions in front of the mixing, or beside it. (B, L, C) tokens -> same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from medmamba.layers import Place
from medmamba.mixers.volume import TokenConv

from .tokens import Chain, Grid, PerToken


def depthwise(width: int, place: Place, size: int = 3) -> nn.Module:
    """SiLU of a depthwise convolution, as in VMamba and Vim's 2D descendants."""
    return Chain(TokenConv(width, place.kernel(size)), PerToken(nn.SiLU()))


def in_plane(width: int, place: Place) -> nn.Module:
    """SiLU of a depthwise convolution that does not look along the slowest axis (the slices)."""
    return Chain(TokenConv(width, (1, *place.kernel(3)[1:])), PerToken(nn.SiLU()))


class LocalSpatial(nn.Module):
    """x + W2 GELU(W1 LayerNorm(depthwise convolution of x)).

    Source: Wang et al., "Mamba YOLO", 2024, arXiv:2406.05835 (LSBlock; BatchNorm there).
    """

    def __init__(self, width: int, place: Place):
        super().__init__()
        self.conv = TokenConv(width, place.kernel(3))
        self.body = PerToken(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        return u + self.body(self.conv(u, grid, mask=mask), grid, mask=mask)


class MultiKernel(nn.Module):
    """x + GELU(shuffle(depthwise convolutions of 3, 5, 7 and 9 on a quarter of the channels each, LayerNorm first)).

    7 and 9 are three convolutions of one axis each, which have 21 and 27 weights instead of 343 and 729.

    Source: Zhang et al., "HRVMamba", 2024, arXiv:2410.03174 (ESInB; square kernels there, in 2D).
    """

    SIZES = (3, 5, 7, 9)
    LARGEST_DENSE = 5

    def __init__(self, width: int, place: Place):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        bounds = [width * i // len(self.SIZES) for i in range(len(self.SIZES) + 1)]
        self.widths = [high - low for low, high in pairwise(bounds)]
        self.convs = nn.ModuleList(
            self._convolution(part, place, size) for part, size in zip(self.widths, self.SIZES, strict=True) if part
        )
        self.act = nn.GELU()

    def _convolution(self, width: int, place: Place, size: int) -> nn.Module:
        if size <= self.LARGEST_DENSE:
            return TokenConv(width, place.kernel(size))
        kernels = [
            tuple(k if other == axis else 1 for other in range(place.ndim))
            for axis, k in enumerate(place.kernel(size))
            if k > 1
        ]
        return Chain(*(TokenConv(width, kernel) for kernel in kernels or [place.kernel(1)]))

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        parts = self.norm(u).split([w for w in self.widths if w], dim=-1)
        mixed = [conv(part, grid, mask=mask) for conv, part in zip(self.convs, parts, strict=True)]
        return u + self.act(_shuffled(torch.cat(mixed, dim=-1), len(mixed)))


class Beside(nn.Module):
    """A mixing and a convolution side by side, both weighted by one squeeze and excitation, and added.

    Source: Pei et al., "EfficientVMamba", 2024, arXiv:2403.09977 (EVSS block).

    Args:
        width: C.
        place: where the block stands.
        mixing: the other side.
        attention: builds the shared weighting from C.
    """

    def __init__(self, width: int, place: Place, mixing: nn.Module, attention: Callable[[int], nn.Module]):
        super().__init__()
        self.mixing = mixing
        self.branch = Chain(
            TokenConv(width, place.kernel(3)), PerToken(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width))
        )
        self.attention = attention(width)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        sides = (side(u, grid, mask=mask) for side in (self.mixing, self.branch))
        first, second = (self.attention(side, grid, mask=mask) for side in sides)
        return first + second


def _shuffled(u: Tensor, groups: int) -> Tensor:
    """Channels of equal groups interleaved; unequal ones (a width that they do not divide) keep their order."""
    if u.shape[-1] % groups:
        return u
    return u.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)


LOCALS: dict[str, Callable[..., nn.Module]] = {
    "dwconv": depthwise,
    "in_plane": in_plane,
    "local_spatial": LocalSpatial,
    "multi_kernel": MultiKernel,
}
