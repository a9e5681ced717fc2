"""Which scans are timed: the shapes that the shipped networks produce at a default plan, and one odd size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from medmamba.mixers import placed_scans
from medmamba.networks import NETWORKS, create_network
from medmamba.networks.spec import USUAL_PATCH, USUAL_STRIDES
from medmamba_kernels.routes import ROUTE_SETS

#: Largest scan that is timed, in tokens x channels x routes: a quarter of a minute for the slowest backend.
MOST_ELEMENTS = 2**26


@dataclass(frozen=True)
class Case:
    """One scan: a (D, H, W) grid, channels, state size and routes; batch 1."""

    name: str
    grid: tuple[int, int, int]
    channels: int
    state_size: int
    routes: str

    @property
    def elements(self) -> int:
        """Tokens x channels x routes: the unit in which times are given."""
        return math.prod(self.grid) * self.channels * len(ROUTE_SETS[self.routes])

    @property
    def bytes_moved(self) -> int:
        """Least traffic of a forward pass in float32: x, dt, B and C read once per route, y read and written."""
        routes = len(ROUTE_SETS[self.routes])
        per_token = self.channels * 4 * 4 + 2 * self.state_size * 4
        return math.prod(self.grid) * routes * per_token

    @property
    def exponentials(self) -> int:
        """Decays of a forward pass: one exponential per element and state."""
        return self.elements * self.state_size


def network_cases(name: str) -> Iterator[Case]:
    """The scans of one network at nnU-Net's usual plan, from a run without data on the meta device."""
    with torch.device("meta"):
        network = create_network(name, 1, 2, strides=USUAL_STRIDES)
    cases = []
    for scan in placed_scans(network, 1, USUAL_PATCH):
        routes = tuple(str(route) for route in scan.core.routes)
        set_name = next(key for key, value in ROUTE_SETS.items() if value == routes)
        label = f"{name} {'x'.join(map(str, scan.grid))}"
        cases.append(Case(label, scan.grid, scan.core.D.shape[-1], scan.core.d_state, set_name))
    yield from dict.fromkeys(cases)


def all_cases() -> list[Case]:
    """Network shapes, then variations of the state size and the routes at 16 cubed, then an odd grid."""
    cases = [case for name in sorted(NETWORKS) for case in network_cases(name)]
    base = Case("16x16x16", (16, 16, 16), 96, 16, "raster6")
    cases += [replace(base, name=f"N {n}", state_size=n) for n in (1, 4, 16)]
    cases += [replace(base, name=f"routes {routes}", routes=routes) for routes in ("raster2", "raster4", "raster12")]
    cases += [replace(base, name="resets at lines", routes="line6")]
    cases += [Case("odd 9x13x11", (9, 13, 11), 40, 16, "raster6")]
    cases += [Case("32x32x32", (32, 32, 32), 96, 16, "raster6")]
    return [case for case in cases if case.elements <= MOST_ELEMENTS]
