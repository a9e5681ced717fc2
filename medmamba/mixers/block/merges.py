"""How the results of several routes become one. (B, L, E) tokens in the raster order of the grid -> same.

A merge builds the mixing of one set of channels from ``core(width, routes, fusion=None)`` and the routes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from medmamba.mixers.fusion import GatedFusion
from medmamba.mixers.mask import keep
from medmamba_kernels import Route

from .tokens import Grid

#: Builds a core from its width, its routes and, if the sum is not wanted, ``fusion=...``.
Core = Callable[..., nn.Module]


def summed(width: int, routes: Sequence[Route], core: Core) -> nn.Module:
    """The sum, inside the scan."""
    return core(width, routes)


class Averaged(nn.Module):
    """The mean: routes may be many, and their sum leaves the range of half precision (reported for Vim and VMamba)."""

    def __init__(self, width: int, routes: Sequence[Route], core: Core):
        super().__init__()
        self.core = core(width, routes)
        self.count = len(routes)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        return self.core(u, grid, mask=mask) / self.count


def gated(width: int, routes: Sequence[Route], core: Core) -> nn.Module:
    """MHS-VM's scan route attention: the sum, weighted by how much the routes disagree."""
    return core(width, routes, fusion=GatedFusion(0.0))


class EachRoute(nn.Module):
    """A core per route, its result through a module of its own, and the sum. One result at a time is kept beside it.

    Args:
        width: E.
        routes: K routes.
        core: builds a core.
        after: ``after(E)``, what every result goes through.
    """

    def __init__(self, width: int, routes: Sequence[Route], core: Core, after: Callable[[int], nn.Module]):
        super().__init__()
        self.cores = nn.ModuleList(core(width, [route]) for route in routes)
        self.after = nn.ModuleList(after(width) for _ in routes)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        y: Tensor | None = None
        for core, after in zip(self.cores, self.after, strict=True):
            part = keep(after(core(u, grid, mask=mask)), mask)
            y = part if y is None else y + part
        assert y is not None
        return y


def normed(width: int, routes: Sequence[Route], core: Core) -> nn.Module:
    """The sum of the results after a LayerNorm each."""
    return EachRoute(width, routes, core, nn.LayerNorm)


def concatenated(width: int, routes: Sequence[Route], core: Core) -> nn.Module:
    """A linear map of the concatenated results to E channels, as the sum of a map per result."""
    return EachRoute(width, routes, core, lambda inner: nn.Linear(inner, inner, bias=False))


class Cascade(nn.Module):
    """One axis after the other: u <- u + core_a(LayerNorm(u)), the routes of an axis (to and fro) in one core.

    Source: Gao et al., "MLFSR", 2024, arXiv:2406.16083 (subspace scanning, one after the other); the triangular case of
    Behrouz et al., "Chimera", 2024, arXiv:2406.04320.
    """

    def __init__(self, width: int, routes: Sequence[Route], core: Core):
        super().__init__()
        orders = dict.fromkeys(route.axes for route in routes)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in orders)
        self.cores = nn.ModuleList(core(width, [route for route in routes if route.axes == axes]) for axes in orders)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        u = keep(u, mask)
        for norm, core in zip(self.norms, self.cores, strict=True):
            u = u + core(norm(u), grid, mask=mask)
        return u


MERGES: dict[str, Callable[[int, Sequence[Route], Core], nn.Module]] = {
    "cascade": Cascade,
    "concat": concatenated,
    "gated": gated,
    "mean": Averaged,
    "norm_sum": normed,
    "sum": summed,
}
