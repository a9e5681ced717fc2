"""Which scans are timed: the shapes that the shipped networks produce at a default plan, variations, and lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from medmamba.mixers import placed_scans
from medmamba.networks import NETWORKS, create_network
from medmamba.networks.spec import USUAL_PATCH, USUAL_STRIDES
from medmamba_kernels.routes import ROUTE_SETS, Grid, Route, resolve_routes
from medmamba_kernels.testing import Problem, make_problem

#: Largest scan that is timed, in tokens x channels x routes: a quarter of a minute for the slowest backend.
MOST_ELEMENTS = 2**26

ONE_ROUTE = ("dhw",)
SWEEP: tuple[Grid, ...] = (
    (8, 8, 8),
    (8, 8, 16),
    (8, 16, 16),
    (16, 16, 16),
    (16, 16, 32),
    (16, 32, 32),
    (32, 32, 32),
)


@dataclass(frozen=True)
class Case:
    """One scan; batch 1.

    Attributes:
        name: what tables and ``--case`` call it.
        grid: (D, H, W).
        channels: of the input.
        state_size: N.
        routes: name of a set in ``ROUTE_SETS``, or routes.
        form: "s6", a decay per channel and state, or "ssd", one per head (Dao & Gu, 2024, arXiv:2405.21060).
        head_size: channels of a head, for "ssd".
        dt_rank: rank of the step sizes, as networks hand them over; 0: the step sizes themselves, as peers take them.
    """

    name: str
    grid: Grid
    channels: int
    state_size: int
    routes: str | tuple[str, ...]
    form: str = "s6"
    head_size: int = 1
    dt_rank: int = 0

    @property
    def length(self) -> int:
        """Tokens."""
        return math.prod(self.grid)

    @property
    def resolved_routes(self) -> tuple[Route, ...]:
        return resolve_routes(self.routes)

    @property
    def elements(self) -> int:
        """Tokens x channels x routes: the unit in which times are given."""
        return self.length * self.channels * len(self.resolved_routes)

    @property
    def heads(self) -> int:
        """Step sizes and decays per token and route: one per channel in the S6 form."""
        return self.channels if self.form == "s6" else self.channels // self.head_size

    @property
    def bytes_moved(self) -> int:
        """Least traffic of a forward pass in float32: x, dt, B and C read once per route, y read and written."""
        per_token = (3 * self.channels + (self.dt_rank or self.heads) + 2 * self.state_size) * 4
        return self.length * len(self.resolved_routes) * per_token

    @property
    def exponentials(self) -> int:
        """Decays of a forward pass: one exponential per element and state (S6), or per token, route and head (SSD)."""
        return self.elements * self.state_size if self.form == "s6" else self.elements // self.head_size

    def problem(self) -> Problem:
        """Random arguments in float32, on the CPU."""
        return make_problem(
            self.grid,
            channels=self.channels,
            state_size=self.state_size,
            routes=self.routes,
            heads=self.heads if self.form == "ssd" else None,
            dt_rank=self.dt_rank or None,
            dtype=torch.float32,
        )


SSD_CASES = (
    Case("ssd P 32 N 16", (16, 16, 16), 96, 16, "raster6", form="ssd", head_size=32),
    Case("ssd P 32 N 64", (16, 16, 16), 96, 64, "raster6", form="ssd", head_size=32),
    Case("ssd 32x32x32 P 32", (32, 32, 32), 96, 16, "raster6", form="ssd", head_size=32),
)


def network_cases(name: str) -> Iterator[Case]:
    """The scans of one network at nnU-Net's usual plan, from a run without data on the meta device."""
    with torch.device("meta"):
        network = create_network(name, 1, 2, strides=USUAL_STRIDES)
    cases = []
    for scan in placed_scans(network, 1, USUAL_PATCH):
        routes = tuple(str(route) for route in scan.core.routes)
        set_name = next((key for key, value in ROUTE_SETS.items() if value == routes), None)
        label = f"{name} {'x'.join(map(str, scan.grid))}"
        cases.append(Case(label, scan.grid, scan.core.D.shape[-1], scan.core.d_state, set_name or routes))
    if len({case.routes for case in cases}) > 1:  # heads or layers with routes of their own
        names = (case.routes if isinstance(case.routes, str) else " ".join(case.routes) for case in cases)
        cases = [replace(case, name=f"{case.name} {routes}") for case, routes in zip(cases, names, strict=True)]
    yield from dict.fromkeys(cases)


def sweep_cases() -> list[Case]:
    """The lengths of the plot, along one route and along six."""
    return [
        Case(f"L {math.prod(grid)} K {count}", grid, 96, 16, routes)
        for count, routes in ((1, ONE_ROUTE), (6, "raster6"))
        for grid in SWEEP
    ]


def all_cases() -> list[Case]:
    """Network shapes, then variations of state size and routes at 16 cubed, an odd grid, SSD, and the lengths."""
    cases = [case for name in sorted(NETWORKS) for case in network_cases(name)]
    base = Case("16x16x16", (16, 16, 16), 96, 16, "raster6")
    cases += [replace(base, name=f"N {n}", state_size=n) for n in (1, 4, 16)]
    cases += [replace(base, name="routes dhw", routes=ONE_ROUTE)]
    cases += [replace(base, name=f"routes {routes}", routes=routes) for routes in ("raster2", "raster4", "raster12")]
    cases += [replace(base, name="resets at lines", routes="line6")]
    cases += [Case("odd 9x13x11", (9, 13, 11), 40, 16, "raster6")]
    cases += [replace(base, name="dt of rank 6", dt_rank=6)]
    cases += [Case("32x32x32, dt of rank 8", (32, 32, 32), 128, 16, "raster6", dt_rank=8)]
    cases += SSD_CASES
    cases += sweep_cases()
    return [case for case in cases if case.elements <= MOST_ELEMENTS]
