"""How far apart the voxels of a route are, and which step sizes remember that far.

A state of the scan decays by exp(dt A) per token, so it remembers 1 / (dt |A|) tokens (e-folding). With A = -1 ... -N,
as Mamba initialises it, the slowest state of a channel remembers 1 / dt tokens: the step size is the timescale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from medmamba_kernels.curves import LINEWISE_CURVES, PLANEWISE_CURVES
from medmamba_kernels.routes import Grid, Route, checked_grid

#: Mamba's step sizes at initialisation, log-uniform in this range (Gu & Dao 2023, arXiv:2312.00752, section 3.6):
#: the slowest states of the channels remember 10 to 1000 tokens.
DEFAULT_DT_RANGE = (1e-3, 1e-1)
_MARGIN, _DECADE = 4.0, 10.0
_T = TypeVar("_T", int, float)


@dataclass(frozen=True)
class RouteLengths:
    """Tokens that a route reads from one place of the grid to another.

    For a route with ``step`` line and plane are those of its sub-grids. Curves without lines or planes (Hilbert,
    Z-order, and the lines of spiral and diagonal) have the sizes of a raster here, to compare with.

    Attributes:
        line: the fastest axis once.
        plane: the two faster axes once.
        volume: the whole grid.
        segment: from one reset of the state to the next.
    """

    line: int
    plane: int
    volume: int
    segment: int


def route_lengths(route: Route, grid: Sequence[int]) -> RouteLengths:
    """Lengths of a route on a (D, H, W) grid, in tokens.

    Raises:
        ValueError: a grid that is not three positive integers.
    """
    volume = math.prod(checked_grid(grid))
    _, n1, n2 = shape = _visiting(route, _sub_grid(route, grid))
    segments = {"line": n2, "plane": n1 * n2, "phase": math.prod(shape), "volume": volume}
    segment = segments[route.reset] if route.reset in segments else min(int(route.reset), volume)
    return RouteLengths(line=n2, plane=n1 * n2, volume=volume, segment=segment)


def dependency_length(
    route: Route,
    grid: Sequence[int],
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    reach_mm: float | None = None,
) -> float:
    """Tokens that a route reads until it has gone ``reach_mm`` along every axis of its segment.

    With n_a voxels of s_a mm along the axes a of a segment, and m_a tokens read per step along axis a (1, a line, a
    plane)::

        length = max over a of  m_a min(n_a, reach / s_a)        but never more than the segment

    What a curve does not read axis by axis counts in full: the planes of spiral and diagonal, the sub-grids of
    a route with ``step`` that does not reset between them. Hilbert and Z-order count the box of the reach.

    Args:
        route: the route.
        grid: (D, H, W) tokens.
        spacing_mm: of the tokens along (D, H, W).
        reach_mm: default: the shortest side of the grid among those with more than one token, so that the
            memory reaches equally far along all axes. An isotropic cube then counts in full.

    Returns:
        tokens, from 1 up to the segment's length.

    Raises:
        ValueError: a grid, spacing or reach that is not positive.
    """
    sizes = checked_grid(grid)
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0 or not all(map(math.isfinite, spacing_mm)):
        raise ValueError(f"spacing must be three positive numbers in mm for (D, H, W), got {tuple(spacing_mm)}")
    if reach_mm is None:
        sides = [n * s for n, s in zip(sizes, spacing_mm, strict=True) if n > 1]
        reach_mm = min(sides, default=math.inf)
    if not reach_mm > 0:
        raise ValueError(f"reach must be a positive number of mm, got {reach_mm}")
    segment = route_lengths(route, grid).segment
    if route.reset == "volume" and route.step != (1, 1, 1):
        return float(segment)
    _, n1, n2 = shape = _visiting(route, _sub_grid(route, sizes))
    spacing = _visiting(route, tuple(s * step for s, step in zip(spacing_mm, route.step, strict=True)))
    steps = [min(float(n), reach_mm / s) for n, s in zip(shape, spacing, strict=True)]
    if route.curve in LINEWISE_CURVES:
        tokens = [steps[2], n2 * steps[1], n1 * n2 * steps[0]]
        length = max({"line": tokens[:1], "plane": tokens[:2]}.get(route.reset, tokens))
    elif route.curve in PLANEWISE_CURVES:
        length = n1 * n2 * max(1.0, 1.0 if route.reset == "plane" else steps[0])
    else:
        length = math.prod(max(1.0, step) for step in steps)
    return min(max(length, 1.0), float(segment))


def route_dt_range(
    route: Route,
    grid: Sequence[int],
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    reach_mm: float | None = None,
) -> tuple[float, float]:
    """Step sizes at initialisation for a route, as (low, high) of a log-uniform distribution.

    With l the :func:`dependency_length` of the route::

        low = 1 / (4 l)        high = max(1 / 10, 10 low), at most 1

    The slowest states of the channels then remember from ten tokens to four times l, every scale in between equally
    often; the slowest of all keeps exp(-1/4) = 78 % over the length l. A length under 25 tokens keeps a decade,
    and no memory is shorter than one token. For l = 250 this is Mamba's own range.

    Arguments, and errors, as :func:`dependency_length`.

    Source: 1 / dt is the length of the dependencies that a state space model with step size dt can see, and is to be
    initialised to the length of those in the data: Gu, Johnson, Timalsina, Rudra & Re, "How to Train Your HiPPO",
    2022, arXiv:2206.12037. That paper has one sequence; the lengths of a route in a volume, the factor 4 and the ten
    tokens are ours, and no accuracy has been measured with them.
    """
    low = 1 / (_MARGIN * dependency_length(route, grid, spacing_mm, reach_mm))
    return low, min(1.0, max(DEFAULT_DT_RANGE[1], _DECADE * low))


def _sub_grid(route: Route, grid: Sequence[int]) -> Grid:
    """The largest of the sub-grids that a route with ``step`` reads one after the other."""
    d, h, w = (-(-n // step) for n, step in zip(checked_grid(grid), route.step, strict=True))
    return d, h, w


def _visiting(route: Route, values: tuple[_T, ...]) -> tuple[_T, _T, _T]:
    """Values of (D, H, W) in the route's order, slowest axis first."""
    slow, middle, fast = (values["dhw".index(axis)] for axis in route.axes)
    return slow, middle, fast
