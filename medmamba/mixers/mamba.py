"""Mamba's own layer on the tokens of a volume: per route a causal convolution and a scan, one gate for all.

Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752, section 3.4 and
figure 3; several directions over one pair of projections: Zhu et al., "Vision Mamba", 2024, arXiv:2401.09417, algorithm
1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba_kernels import Route, resolve_routes
from medmamba_kernels.routes import Grid, route_table

from .mask import keep


class MambaDirection(nn.Module):
    """core(SiLU(causal convolution)) along one route. (B, L, E) tokens in raster order -> same.

    Args:
        width: E.
        core: builds the token mixer from ``(E, dt_rank=..., routes=...)``.
        dt_rank: rank of its step size projection.
        conv_size: tokens that the depthwise convolution sees: a token itself and those before it on the route. The
            places where a route clears the state (``reset``) are ordinary tokens to it.
        route: order of the tokens.

    Masked tokens (``mask``, see :mod:`medmamba.mixers`) are zeros to the convolution: a token behind a gap sees the gap
    and not, as it would in the compacted sequence, the tokens in front of it. The scan is that of the compacted one.
    """

    def __init__(self, width: int, *, core: Callable[..., nn.Module], dt_rank: int, conv_size: int, route: Route):
        super().__init__()
        self.route = route
        self.conv1d = nn.Conv1d(width, width, conv_size, groups=width)
        self.act = nn.SiLU()
        self.core = core(width, dt_rank=dt_rank, routes=[str(route)])

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        return self.core(self.act(self.convolve(keep(u, mask), grid)), grid, mask=mask)

    def convolve(self, u: Tensor, grid: Grid) -> Tensor:
        """The causal convolution along the route; raster order in and out."""
        along = F.pad(_visit(u, self.route, grid).mT, (self.conv1d.kernel_size[0] - 1, 0))
        return _return(self.conv1d(along).mT, self.route, grid)


class Mamba(nn.Module):
    """Mamba-1, with as many directions as there are routes; along one route it is the published block.

    ::

        (u, z) = W_in x        y = sum over routes k of core_k(SiLU(conv_k(u)))        out = W_out (y * SiLU(z))

    (B, *spatial, d) -> same. Each route has its own convolution and scan.

    Args:
        width: d.
        core: builds the token mixer from ``(expanded width, dt_rank=..., routes=...)``.
        routes: a route set or a list of routes.
        expand: E / d.
        conv_size: tokens of the causal convolution.

    Raises:
        ValueError: an unknown route.
    """

    def __init__(
        self,
        width: int,
        *,
        core: Callable[..., nn.Module],
        routes: str | Sequence[str],
        expand: float = 2.0,
        conv_size: int = 4,
    ):
        super().__init__()
        inner, rank = int(expand * width), math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.directions = nn.ModuleList(
            MambaDirection(inner, core=core, dt_rank=rank, conv_size=conv_size, route=route)
            for route in resolve_routes(routes)
        )
        self.act = nn.SiLU()
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        batch, *spatial, inner = u.shape
        grid = cast(Grid, (1,) * (3 - len(spatial)) + tuple(spatial))
        tokens = u.reshape(batch, -1, inner)
        y = torch.stack([direction(tokens, grid) for direction in self.directions]).sum(0)
        return self.out_proj(y.view(u.shape) * self.act(z))


class MambaLayer(nn.Module):
    """x + Mamba(LayerNorm(x)), then x + MLP(LayerNorm(x)) with GELU. (B, *spatial, d) -> same.

    Args:
        width: d.
        mamba: builds the Mamba from d.
        mlp_ratio: hidden width of the MLP over d.

    Source: the layer of MambaMIM's network (Tang et al., 2024, arXiv:2408.08070), MLP twice as wide.
    """

    def __init__(self, width: int, *, mamba: Callable[[int], nn.Module], mlp_ratio: float = 2.0):
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.norm1 = nn.LayerNorm(width)
        self.mamba = mamba(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mamba(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _visit(u: Tensor, route: Route, grid: Grid) -> Tensor:
    """(B, L, E) from raster order to the order of the route."""
    if not _is_plain_raster(route):
        return u[:, _order(route, grid, u.device)]
    axes = _axes(route)
    moved = u.unflatten(1, grid).permute(0, *axes, 4).flatten(1, 3)
    return moved.flip(1) if route.reverse else moved


def _return(v: Tensor, route: Route, grid: Grid) -> Tensor:
    """Inverse of :func:`_visit`."""
    if not _is_plain_raster(route):
        return v[:, _order(route, grid, v.device).argsort()]
    axes = _axes(route)
    v = v.flip(1) if route.reverse else v
    back = [1 + axes.index(axis) for axis in (1, 2, 3)]
    return v.unflatten(1, [grid[axis - 1] for axis in axes]).permute(0, *back, 4).flatten(1, 3)


def _is_plain_raster(route: Route) -> bool:
    """Whether the order is a permutation of the axes and perhaps a reversal: views instead of tables."""
    return route.curve == "raster" and not route.flip and route.step == (1, 1, 1)


def _axes(route: Route) -> list[int]:
    """Axes of (B, D, H, W, E) in the route's order, slowest first."""
    return [1 + "dhw".index(axis) for axis in route.axes]


def _order(route: Route, grid: Grid, device: torch.device) -> Tensor:
    return route_table((route,), grid).order[0].to(device, torch.int64)
