"""Which grid a mixing reads: the volume, a pooled one beside it, its phases, or the profiles along its axes.

A grid builds a mixing from ``mixing(width, routes)``, the routes and the place of the block, which says by how much
every axis may be reduced (:attr:`medmamba.layers.Place.pool`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers import Place
from medmamba.layers.convolution import CONV
from medmamba.mixers.mask import keep
from medmamba.mixers.volume import as_tokens, as_volume
from medmamba_kernels import Route

from .assign import Mixing
from .tokens import Grid, grid_of, token_mean

_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
_INTERPOLATION = {2: "bilinear", 3: "trilinear"}
#: Of the strided convolution in front of a pooled grid, along the axes that are reduced.
POOLED_KERNEL = 7


def full(width: int, routes: Sequence[Route], place: Place, mixing: Mixing) -> nn.Module:
    """The volume itself."""
    return mixing(width, routes)


class Pooled(nn.Module):
    """The first route reads the volume, the others a smaller one, which a strided depthwise convolution makes.

    y = LayerNorm(mix_0(u)) + up(LayerNorm(mix_1(SiLU(conv(u))))), up linear along each axis. Where nothing can
    be reduced, and with a single route, all routes read the volume.

    Source: Shi et al., "Multi-Scale VMamba", 2024, arXiv:2405.14174.
    """

    def __init__(self, width: int, routes: Sequence[Route], place: Place, mixing: Mixing):
        super().__init__()
        reduces = max(place.pool) > 1 and len(routes) > 1
        self.norm = nn.LayerNorm(width)
        self.mixing = mixing(width, routes[:1] if reduces else routes)
        self.stride = place.pool if reduces else None
        if reduces:
            kernel = [POOLED_KERNEL if p > 1 else k for p, k in zip(place.pool, place.kernel_size, strict=True)]
            self.conv = CONV[place.ndim](
                width, width, tuple(kernel), stride=place.pool, padding=tuple(k // 2 for k in kernel), groups=width
            )
            self.act = nn.SiLU()
            self.pooled = mixing(width, routes[1:])
            self.pooled_norm = nn.LayerNorm(width)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        y = keep(self.norm(self.mixing(u, grid, mask=mask)), mask)
        if self.stride is None:
            return y
        x = self.act(self.conv(as_volume(keep(u, mask), grid, len(self.stride))))
        small, small_mask = grid_of(x.shape[2:]), self._pooled_mask(mask, grid)
        v = keep(self.pooled_norm(self.pooled(as_tokens(x), small, mask=small_mask)), small_mask)
        ndim = len(self.stride)
        up = F.interpolate(as_volume(v, small, ndim), size=grid[3 - ndim :], mode=_INTERPOLATION[ndim])
        return keep(y + as_tokens(up), mask)

    def _pooled_mask(self, mask: Tensor | None, grid: Grid) -> Tensor | None:
        """A token of the smaller volume takes part if one of those in its place does."""
        if mask is None or self.stride is None:
            return None
        ndim = len(self.stride)
        volume = mask.view(-1, 1, *grid[3 - ndim :]).float()
        pool = _MAX_POOL[ndim](volume, self.stride, self.stride, ceil_mode=True)
        return pool.flatten(1) > 0


class Phases(nn.Module):
    """Atrous: the interleaved sub-grids of the volume, each read by a mixing and along a route of its own.

    With steps p per axis there are prod(p) phases of any size, so odd axes need no padding; phase i reads route i
    (modulo their number). Every token is read once in all.

    Source: Pei et al., "EfficientVMamba", 2024, arXiv:2403.09977 (four phases of a map, orders and steps for p = 2).
    """

    def __init__(self, width: int, routes: Sequence[Route], place: Place, mixing: Mixing):
        super().__init__()
        self.step = grid_of(place.pool)
        self.mixings = nn.ModuleList(mixing(width, [routes[i % len(routes)]]) for i in range(prod(self.step)))

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        volume = u.unflatten(1, grid)
        kept = None if mask is None else mask.view(-1, *grid)
        y = torch.zeros_like(volume)
        for mixing, offset in zip(self.mixings, product(*map(range, self.step)), strict=True):
            phase = tuple(slice(o, None, s) for o, s in zip(offset, self.step, strict=True))
            part = volume[(slice(None), *phase)]
            if part.numel() == 0:  # an axis shorter than its step
                continue
            part_mask = None if kept is None else kept[(slice(None), *phase)].flatten(1)
            mixed = mixing(part.flatten(1, 3), grid_of(part.shape[1:4]), mask=part_mask)
            y[(slice(None), *phase)] = mixed.view(part.shape).to(y.dtype)
        return y.flatten(1, 3)


class Profiles(nn.Module):
    """Axis by axis, the means over the two others as one line, mixed to and fro; the sum of all, spread out again.

    The lines of a volume of L tokens have D + H + W in all, so this costs next to nothing.

    Source: the unused "axis" mode of Multi-Scale VMamba's code (arXiv:2405.14174).
    """

    def __init__(self, width: int, routes: Sequence[Route], place: Place, mixing: Mixing):
        super().__init__()
        self.axes = range(3 - place.ndim, 3)
        line = [Route("dhw"), Route("dhw", reverse=True)]
        self.mixings = nn.ModuleList(mixing(width, line) for _ in self.axes)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        y = torch.zeros_like(u).unflatten(1, grid)
        volume = keep(u, mask).unflatten(1, grid)
        kept = None if mask is None else mask.view(-1, *grid)
        for axis, mixing in zip(self.axes, self.mixings, strict=True):
            n = grid[axis]
            line, line_mask = self._line(volume, kept, axis)
            shape = [u.shape[0], *(n if a == axis else 1 for a in range(3)), u.shape[-1]]
            y = y + mixing(line, (1, 1, n), mask=line_mask).view(shape)
        return keep(y.flatten(1, 3), mask)

    def _line(self, volume: Tensor, kept: Tensor | None, axis: int) -> tuple[Tensor, Tensor | None]:
        """(B, n, C) means over the planes across the axis, and which of them have a token that takes part."""
        batch, n = volume.shape[0], volume.shape[axis + 1]
        planes = volume.movedim(axis + 1, 1).reshape(batch * n, -1, volume.shape[-1])
        if kept is None:
            return token_mean(planes, None).view(batch, n, -1), None
        masks = kept.movedim(axis + 1, 1).reshape(batch * n, -1)
        return token_mean(planes, masks).view(batch, n, -1), masks.any(1).view(batch, n)


GRIDS: dict[str, Callable[[int, Sequence[Route], Place, Mixing], nn.Module]] = {
    "full": full,
    "phase": Phases,
    "pool": Pooled,
    "profile": Profiles,
}
