"""Routes that share weights: the same scan with copies, and what a set does with the ranges of its routes."""

from __future__ import annotations

import pytest
import torch

from medmamba.diagnostics import measure_step_sizes, step_sizes
from medmamba.mixers import ScanCore, SpatialCore, SSDCore
from medmamba.mixers.routed import parameter_sets
from medmamba_kernels import resolve_routes

GRID = (3, 2, 5)
KINDS = [ScanCore, SSDCore, SpatialCore]
SETS = {"route": (0, 1, 2, 3, 4, 5), "direction": (0, 0, 0, 1, 1, 1), "shared": (0,) * 6}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, parameters: str, routes="raster6", **options):
    torch.manual_seed(0)
    return kind(6, d_state=2, dt_rank=2, routes=routes, parameters=parameters, **options).double()


def tokens() -> torch.Tensor:
    return torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def per_set(core) -> dict[str, torch.Tensor]:
    """The parameters that have a row for every set."""
    names = {"x_proj", "state_proj", "dt_proj", "dt_bias", "A_log", *([] if isinstance(core, SpatialCore) else ["D"])}
    return {name: value for name, value in core.state_dict().items() if name in names}


@pytest.mark.parametrize("parameters", SETS)
def test_sets_follow_the_directions_of_the_routes(parameters):
    assert parameter_sets(resolve_routes("raster6"), parameters) == SETS[parameters]


def test_sets_are_numbered_by_their_first_route():
    routes = resolve_routes(["dhw:reverse", "hwd", "wdh:reverse"])
    assert parameter_sets(routes, "direction") == (0, 1, 0)
    assert parameter_sets(resolve_routes(["dhw:reverse"]), "direction") == (0,)


@every_kind
@pytest.mark.parametrize("parameters", SETS)
@pytest.mark.parametrize("masked", [False, True])
def test_shared_weights_are_copies_of_one_set(kind, parameters, masked):
    core, copies = make(kind, parameters), make(kind, "route")
    assert {len(value) for value in per_set(core).values()} == {len(set(SETS[parameters]))}
    rows = {name: value[list(SETS[parameters])] for name, value in per_set(core).items()}
    copies.load_state_dict({**core.state_dict(), **rows})
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    u = tokens()
    torch.testing.assert_close(core(u, GRID, mask=mask), copies(u, GRID, mask=mask), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(core.step_sizes(u), copies.step_sizes(u), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(u)
    (core(u, GRID, mask=mask) * weights).sum().backward()
    (copies(u, GRID, mask=mask) * weights).sum().backward()
    for name in rows:
        own, theirs = core.get_parameter(name).grad, copies.get_parameter(name).grad
        summed = torch.zeros_like(own).index_add(0, torch.tensor(SETS[parameters]), theirs)
        torch.testing.assert_close(own, summed, rtol=1e-10, atol=1e-10)


@every_kind
def test_a_set_takes_the_whole_range_of_its_routes(kind):
    ranges = [(1e-3, 1e-2), (1e-4, 1e-3), (1e-2, 1e-1), (0.1, 0.2), (0.2, 0.4), (0.3, 0.5)]
    for parameters, expected in (
        ("route", ranges),
        ("direction", [(1e-4, 1e-1), (0.1, 0.5)]),
        ("shared", [(1e-4, 0.5)]),
    ):
        core = make(kind, parameters, dt_range=ranges)
        assert core.dt_ranges == expected
        core.reset_step_sizes((1e-5, 1e-4))
        assert core.dt_ranges == [(1e-5, 1e-4)] * len(expected)
        core.reset_step_sizes(ranges)
        assert core.dt_ranges == expected
        dt = torch.nn.functional.softplus(core.dt_bias)
        for row, (low, high) in zip(dt, expected, strict=True):
            assert low * 0.99 < row.min() <= row.max() < high * 1.01


@every_kind
def test_the_memory_of_every_route_is_found_for_a_set_too(kind):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.core = make(kind, "direction")

        def forward(self, x):
            return self.core(x, GRID)

    network = Network()
    measured = measure_step_sizes(network, tokens())["core"]
    assert len(measured.dt) == len(measured.A) == 6
    assert torch.equal(measured.A[0], measured.A[2])
    assert not torch.equal(measured.A[0], measured.A[3]) or kind is not SSDCore
    assert len(step_sizes(network.state_dict())["core"].dt) == 2


@every_kind
def test_another_kind_of_sharing_is_refused(kind):
    with pytest.raises(ValueError, match="parameters must be one of route, direction, shared, got 'all'"):
        make(kind, "all")
