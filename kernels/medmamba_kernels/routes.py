"""Scan routes: in which order a volume is read. A route is data; nothing here copies a volume.

A route is written as text, which is also how it is stored in a plans file::

    "dhw"                       raster, W fastest
    "hwd:reverse"               raster with D fastest, read from its last voxel to its first
    "dwh:snake:reset=plane"     boustrophedon, state cleared at every plane
    "dhw:flip=h:spiral"         spiral with the H axis mirrored
    "dhw:step=2x2x2:reset=phase"  atrous: the eight interleaved sub-grids one after the other
    "hwd:reset=8"               raster, state cleared every eight tokens

Axis letters name the axes of the array, ``d h w`` = (D, H, W); a 2D image is a volume with D = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .curves import CURVES, LINEWISE_CURVES, PLANEWISE_CURVES

Grid = tuple[int, int, int]

AXIS_ORDERS = ("dhw", "dwh", "hdw", "hwd", "wdh", "whd")
RESETS = ("volume", "phase", "plane", "line")


@dataclass(frozen=True)
class Route:
    """One way to visit every voxel of a (D, H, W) grid exactly once.

    Attributes:
        axes: visiting order of the axes, slowest first; one of ``AXIS_ORDERS``.
        curve: key of ``CURVES``, how the grid is filled (in visiting axes).
        reverse: read the whole sequence from its end.
        flip: axes that are mirrored before the curve is laid, e.g. ``"h"`` or ``"dw"``.
        reset: where the state is cleared: never within the ``volume``, at every ``phase`` (sub-grid of
            ``step``), at every ``plane`` or at every ``line`` of the visiting order, or after so many tokens ("8").
        step: stride per axis in (D, H, W) order; the sub-grids are read one after the other.

    Raises:
        ValueError: an option that is not one of the above, or a reset the curve cannot have.
    """

    axes: str = "dhw"
    curve: str = "raster"
    reverse: bool = False
    flip: str = ""
    reset: str = "volume"
    step: Grid = (1, 1, 1)

    def __post_init__(self) -> None:
        if self.axes not in AXIS_ORDERS:
            raise ValueError(f"unknown axis order {self.axes!r}; known: {', '.join(AXIS_ORDERS)}")
        if self.curve not in CURVES:
            raise ValueError(f"unknown curve {self.curve!r}; known: {', '.join(sorted(CURVES))}")
        if self.reset not in RESETS and not (self.reset.isdecimal() and int(self.reset) > 0):
            raise ValueError(f"unknown reset {self.reset!r}; known: {', '.join(RESETS)}, or a number of tokens")
        if set(self.flip) - set("dhw") or len(set(self.flip)) != len(self.flip):
            raise ValueError(f"flip must name each of d, h, w at most once, not {self.flip!r}")
        if len(self.step) != 3 or min(self.step) < 1:
            raise ValueError(f"step must be three integers >= 1 for (d, h, w), not {self.step!r}")
        if self.reset == "line" and self.curve not in LINEWISE_CURVES:
            raise ValueError(f"curve {self.curve!r} has no lines to reset at; use raster or snake")
        if self.reset == "plane" and self.curve not in PLANEWISE_CURVES:
            raise ValueError(f"curve {self.curve!r} has no planes to reset at; use reset=volume")

    def __str__(self) -> str:
        options = [self.axes]
        if self.curve != "raster":
            options.append(self.curve)
        if self.flip:
            options.append(f"flip={self.flip}")
        if self.step != (1, 1, 1):
            options.append("step=" + "x".join(str(s) for s in self.step))
        if self.reset != "volume":
            options.append(f"reset={self.reset}")
        if self.reverse:
            options.append("reverse")
        return ":".join(options)

    def reversed(self) -> Route:
        """The same path walked from its other end (resets stay at the borders of the same segments)."""
        return Route(self.axes, self.curve, not self.reverse, self.flip, self.reset, self.step)

    def order(self, grid: Sequence[int]) -> Tensor:
        """Visiting order: ``order[p]`` is the raster index (W fastest) of the voxel read at step ``p``.

        Args:
            grid: (D, H, W), every entry >= 1.

        Returns:
            (D*H*W,) int64, a permutation.

        Raises:
            ValueError: a grid that is not three positive integers.
        """
        return self._path(checked_grid(grid))[0]

    def inverse(self, grid: Sequence[int]) -> Tensor:
        """Inverse of :meth:`order`: the step at which each raster index is read, (D*H*W,) int64."""
        order = self.order(grid)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        return inverse

    def starts(self, grid: Sequence[int]) -> Tensor:
        """Steps before which the state is cleared, (D*H*W,) bool; entry 0 is always True."""
        return self._path(checked_grid(grid))[1]

    def _path(self, grid: Grid) -> tuple[Tensor, Tensor]:
        raster_DHW = torch.arange(math.prod(grid)).view(grid)
        raster_DHW = raster_DHW.flip([i for i, axis in enumerate("dhw") if axis in self.flip])
        visiting = ["dhw".index(axis) for axis in self.axes]
        orders, segments = [], []
        for phase in _phases(grid, self.step):
            sub = raster_DHW[tuple(slice(p, None, s) for p, s in zip(phase, self.step, strict=True))]
            sub = sub.permute(visiting)
            orders.append(sub.reshape(-1)[CURVES[self.curve](*sub.shape)])
            segments.append(self._segment_lengths(tuple(sub.shape)))
        order = torch.cat(orders)
        if self.reset == "volume":
            lengths = [order.numel()]
        elif self.reset.isdecimal():
            lengths = [len(window) for window in order.split(int(self.reset))]
        else:
            lengths = [n for part in segments for n in part]
        if self.reverse:
            order = order.flip(0)
            lengths = lengths[::-1]
        starts = torch.zeros(order.numel(), dtype=torch.bool)
        starts[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        return order, starts

    def _segment_lengths(self, shape: tuple[int, ...]) -> list[int]:
        n0, n1, n2 = shape
        if self.reset == "line":
            return [n2] * (n0 * n1)
        if self.reset == "plane":
            return [n1 * n2] * n0
        return [n0 * n1 * n2]


def _phases(grid: Grid, step: Grid) -> list[Grid]:
    return [
        (d, h, w)
        for d in range(min(step[0], grid[0]))
        for h in range(min(step[1], grid[1]))
        for w in range(min(step[2], grid[2]))
    ]


def checked_grid(grid: Sequence[int]) -> Grid:
    """Three positive integers (D, H, W), or ValueError with what was given."""
    sizes = tuple(int(n) for n in grid)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"grid must be (D, H, W) with every entry >= 1, got {tuple(grid)}; a 2D image is (1, H, W)")
    return sizes


def parse_route(text: str | Route) -> Route:
    """Read a route from its text form (see the module docstring); inverse of ``str(route)``.

    Raises:
        ValueError: an option that no route has; the message lists the known ones.
    """
    if isinstance(text, Route):
        return text
    axes, *options = text.split(":")
    fields: dict[str, object] = {"axes": axes}
    for option in options:
        key, _, value = option.partition("=")
        if option in CURVES:
            fields["curve"] = option
        elif option == "reverse":
            fields["reverse"] = True
        elif key in ("flip", "reset") and value:
            fields[key] = value
        elif key == "step" and all(part.isdigit() for part in value.split("x")):
            fields["step"] = tuple(int(part) for part in value.split("x"))
        else:
            resets = "|".join([*RESETS, "N"])
            known = ", ".join([*sorted(CURVES), "reverse", "flip=AXES", f"reset={resets}", "step=AxBxC"])
            raise ValueError(f"unknown option {option!r} in route {text!r}; known: {known}")
    return Route(**fields)  # type: ignore[arg-type]


def _both_ways(*forward: str) -> tuple[str, ...]:
    """The routes, then each of them reversed: VMamba's order of the routes of a block."""
    return (*forward, *(str(parse_route(text).reversed()) for text in forward))


def _in_pairs(*forward: str) -> tuple[str, ...]:
    """Each route followed by its reverse: MHS-VM's order of the routes of a head."""
    return tuple(str(route) for text in forward for route in (parse_route(text), parse_route(text).reversed()))


# The default of a 3D block is raster6: three rasters, every axis fastest exactly once, times two directions
# (most published 3D ports leave one axis never fastest). raster4 is VMamba's set of a 2D block, in its order.
# mhs_*: the patterns of MHS-VM's heads (C snake, X diagonal, S spiral, Z raster). *4 are the published routes of
# a plane, *6 the ones of a volume: C and Z once per fastest axis, X and S once per normal of their slices.
ROUTE_SETS: dict[str, tuple[str, ...]] = {
    "line6": _both_ways("dhw:reset=line", "dwh:reset=line", "hwd:reset=line"),
    "mhs_c4": _in_pairs("dhw:snake", "dwh:snake"),
    "mhs_c6": _in_pairs("dhw:snake", "dwh:snake", "hwd:snake"),
    "mhs_s4": _in_pairs("dhw:spiral", "dhw:flip=h:spiral"),
    "mhs_s6": _in_pairs("dhw:spiral", "hdw:spiral", "wdh:spiral"),
    "mhs_x4": _in_pairs("dhw:diagonal", "dhw:flip=w:diagonal"),
    "mhs_x6": _in_pairs("dhw:diagonal", "hdw:diagonal", "wdh:diagonal"),
    "mhs_z4": _in_pairs("dhw", "dwh"),
    "mhs_z6": _in_pairs("dhw", "dwh", "hwd"),
    "raster12": _both_ways(*AXIS_ORDERS),
    "raster2": _both_ways("dhw"),
    "raster4": _both_ways("dhw", "dwh"),
    "raster6": _both_ways("dhw", "dwh", "hwd"),
    "snake6": _both_ways("dhw:snake", "dwh:snake", "hwd:snake"),
}


def resolve_routes(routes: str | Sequence[str | Route]) -> tuple[Route, ...]:
    """Routes from the name of a set in ``ROUTE_SETS`` or from a list of routes.

    Raises:
        ValueError: an empty list, or a name that is no set and no route.
    """
    if isinstance(routes, str):
        if routes not in ROUTE_SETS:
            known = ", ".join(sorted(ROUTE_SETS))
            raise ValueError(
                f"unknown route set {routes!r}; known: {known}; or give a list such as ['dhw', 'dwh:reverse']"
            )
        routes = ROUTE_SETS[routes]
    if not routes:
        raise ValueError("a scan needs at least one route")
    return tuple(parse_route(route) for route in routes)


@dataclass(frozen=True)
class RouteTable:
    """The routes of one block on one grid, as the backends read them.

    Attributes:
        order: (K, L) int32, CPU, contiguous: raster index read at step p of route k.
        starts: (K, L) bool, CPU, contiguous, or None when no route resets within the volume.
    """

    order: Tensor
    starts: Tensor | None


@lru_cache(maxsize=64)
def route_table(routes: tuple[Route, ...], grid: Grid) -> RouteTable:
    """Tables of all routes on a grid, cached (4 bytes per token and route).

    Raises:
        ValueError: a grid with 2^31 voxels or more, which int32 cannot index.
    """
    if math.prod(grid) >= 2**31:
        raise ValueError(f"grid {grid} has {math.prod(grid)} voxels; at most 2^31 - 1 can be scanned")
    order = torch.stack([route.order(grid) for route in routes]).to(torch.int32)
    if all(route.reset == "volume" for route in routes):
        return RouteTable(order, None)
    return RouteTable(order, torch.stack([route.starts(grid) for route in routes]))
