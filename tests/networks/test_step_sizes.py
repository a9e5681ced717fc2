"""Step sizes at initialisation: their ranges, what a route's length makes of them, and how a network is given them."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from medmamba.mixers import ScanCore, initialise_step_sizes, placed_scans
from medmamba.mixers.timescale import DEFAULT_DT_RANGE, dependency_length, route_dt_range, route_lengths
from medmamba.networks import create_network
from medmamba_kernels import ROUTE_SETS, parse_route, selective_scan_reference

STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
PATCH, SPACING = (16, 32, 32), (3.0, 1.0, 1.0)
TINY = {"strides": STRIDES, "base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2}


def build(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return create_network("vmunet", 1, 2, **{**TINY, **kwargs})


def core_with(dt_range=None, seed: int = 0, width: int = 400) -> ScanCore:
    torch.manual_seed(seed)
    return ScanCore(width, d_state=1, dt_rank=2, routes=["dhw", "dwh:reset=line"], dt_range=dt_range)


def test_the_default_is_mambas_draw_bit_for_bit():
    core = core_with()
    torch.manual_seed(0)
    torch.empty_like(core.x_proj).uniform_()
    torch.empty_like(core.dt_proj).uniform_()
    low, high = math.log(1e-3), math.log(1e-1)
    dt = torch.exp(torch.rand(2, 400) * (high - low) + low)
    assert torch.equal(core.dt_bias, dt + torch.log(-torch.expm1(-dt)))
    assert core.dt_ranges == [DEFAULT_DT_RANGE] * 2


@pytest.mark.parametrize("dt_range", [(1e-5, 1e-2), [[1e-5, 1e-3], [0.2, 0.9]]], ids=["one pair", "per route"])
def test_step_sizes_are_log_uniform_in_their_range(dt_range):
    core = core_with(json.loads(json.dumps(dt_range)))
    for k, (low, high) in enumerate(core.dt_ranges):
        place = (F.softplus(core.dt_bias[k].double()).log() - math.log(low)) / math.log(high / low)
        assert -1e-3 < place.min() < 0.02
        assert 0.98 < place.max() < 1 + 1e-3
        assert abs(place.mean() - 0.5) < 0.05  # 400 draws: standard error 0.014


def test_a_range_changes_dt_bias_only():
    default, other = core_with().state_dict(), core_with((1e-5, 1e-2)).state_dict()
    assert [key for key in default if not torch.equal(default[key], other[key])] == ["dt_bias"]


@pytest.mark.parametrize(
    "dt_range", [(0.1, 0.01), (0.0, 0.1), [[1e-3, 0.1]] * 3, [0.1], [], [[0.1, math.inf]] * 2], ids=str
)
def test_an_impossible_range_is_refused(dt_range):
    with pytest.raises(ValueError, match="dt_range must"):
        core_with(dt_range)


def test_step_sizes_are_those_that_the_scan_uses():
    torch.manual_seed(0)
    core = ScanCore(5, d_state=3, dt_rank=2, routes="raster2").double()
    u = torch.randn(2, 12, 5, dtype=torch.float64)
    projected = torch.einsum("ble,kre->blkr", u, core.x_proj)
    _, B, C = projected.split([2, 3, 3], dim=-1)
    y, _ = selective_scan_reference(
        u,
        core.step_sizes(u),
        -torch.exp(core.A_log),
        B,
        C,
        core.D,
        routes=core.routes,
        grid=(1, 3, 4),
        dt_softplus=False,
    )
    torch.testing.assert_close(core(u, (1, 3, 4)), y)


GRIDS = [(1, 1, 1), (4, 6, 5), (1, 7, 9), (8, 8, 8)]
ROUTES = sorted({route for routes in ROUTE_SETS.values() for route in routes})
ROUTES += ["dhw:step=2x2x2", "whd:step=1x2x3:reset=phase", "dhw:spiral:reset=plane", "hwd:hilbert", "dhw:reset=plane"]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("text", ROUTES)
def test_the_segment_is_the_longest_that_the_route_really_has(text, grid):
    route = parse_route(text)
    segments = (route.starts(grid).cumsum(0) - 1).bincount()
    lengths = route_lengths(route, grid)
    assert lengths.segment == segments.max()
    assert lengths.line <= lengths.plane <= lengths.volume == math.prod(grid)


@pytest.mark.parametrize("text", [text for text in ROUTES if ":" not in text])
def test_line_and_plane_are_the_distances_between_neighbours(text):
    grid = (4, 6, 5)
    route = parse_route(text)
    steps = route.inverse(grid).view(grid)
    visited = steps.permute(["dhw".index(axis) for axis in route.axes])
    lengths = route_lengths(route, grid)
    assert visited[0, 1, 0] - visited[0, 0, 0] == lengths.line
    assert visited[1, 0, 0] - visited[0, 0, 0] == lengths.plane


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("text", ROUTES)
def test_a_dependency_lies_within_the_segment_and_grows_with_the_reach(text, grid):
    route = parse_route(text)
    found = [dependency_length(route, grid, (3.0, 1.0, 1.0), reach) for reach in (0.1, 1.0, 4.0, 1e9)]
    assert 1 <= found[0] <= found[1] <= found[2] <= found[3] <= route_lengths(route, grid).segment
    assert found[3] == route_lengths(route, grid).segment


@pytest.mark.parametrize(
    ("text", "spacing", "length"),
    [
        ("dhw", (1, 1, 1), 8**3),
        ("dhw:reset=line", (1, 1, 1), 8),
        ("dhw", (4, 1, 1), 2 * 64),  # within the shortest side of 8 mm lie two slices
        ("hwd", (4, 1, 1), 8**3),  # and all 8 rows, which this route reads last
        ("hwd:reset=line", (4, 1, 1), 2),
        ("dhw:hilbert", (4, 1, 1), 2 * 8 * 8),
    ],
)
def test_the_default_reach_is_the_shortest_side(text, spacing, length):
    assert dependency_length(parse_route(text), (8, 8, 8), spacing) == length


def test_ranges_follow_the_length():
    def of(length: int) -> tuple[float, float]:
        return route_dt_range(parse_route("dhw"), (1, 1, length))

    assert of(250) == pytest.approx(DEFAULT_DT_RANGE)
    assert of(32**3) == pytest.approx((1 / 2**17, 0.1))
    assert of(8) == pytest.approx((1 / 32, 10 / 32))
    assert of(1) == pytest.approx((0.25, 1.0))


@pytest.mark.parametrize(
    ("spacing", "reach"), [((1, 1), None), ((0, 1, 1), None), ((math.nan, 1, 1), None), ((1, 1, 1), 0.0)], ids=str
)
def test_impossible_distances_are_refused(spacing, reach):
    with pytest.raises(ValueError, match="must be"):
        dependency_length(parse_route("dhw"), (2, 2, 2), spacing, reach)


@pytest.mark.parametrize("training", [True, False])
def test_scans_are_found_with_the_grids_of_a_real_run(training):
    network = build().train(training)
    seen = []
    for name, module in network.named_modules():
        if isinstance(module, ScanCore):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, inputs[1])))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = [(scan.name, scan.grid) for scan in placed_scans(network, 1, PATCH)]
    seen.clear()
    network(torch.zeros(1, 1, *PATCH))
    assert found == seen
    assert network.training is training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert placed_scans(build(ssm_mode="identity"), 1, PATCH) == []


def test_a_patch_that_does_not_fit_is_refused_and_leaves_no_hook():
    network = build()
    with pytest.raises(ValueError, match="not divisible"):
        placed_scans(network, 1, (15, 32, 32))
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_network_gets_the_range_of_every_route():
    dt_init = json.loads(json.dumps({"patch_size": PATCH, "spacing": SPACING}))
    network = build(dt_init=dt_init)
    for scan in placed_scans(network, 1, PATCH):
        spacing = [s * p / g for s, p, g in zip(SPACING, PATCH, scan.grid, strict=True)]
        expected = [route_dt_range(route, scan.grid, spacing) for route in scan.core.routes]
        torch.testing.assert_close(scan.core.dt_ranges, expected)
    assert network(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)


@pytest.mark.parametrize("dt_init", [(1e-4, 1e-2), {"patch_size": PATCH}], ids=["pair", "route"])
def test_with_the_same_seed_only_dt_bias_differs(dt_init):
    default, other = build().state_dict(), build(dt_init=dt_init).state_dict()
    assert list(default) == list(other)
    changed = {key for key in default if not torch.equal(default[key], other[key])}
    assert changed == {key for key in default if key.endswith("dt_bias")}


def test_images_and_controls_take_it_too():
    strides = [[1, 1], [2, 2], [2, 2], [2, 2]]
    network = build(strides=strides, dt_init={"patch_size": [32, 48], "spacing": [0.5, 0.5]})
    (first, *_) = placed_scans(network, 1, (32, 48))
    # The shortest side is that of the 8 rows: 8 of 12 columns' width.
    assert first.grid == (1, 8, 12)
    assert first.core.dt_ranges[0] == pytest.approx((1 / (4 * 8 * 12), 0.1))
    build(ssm_mode="identity", dt_init={"patch_size": PATCH})


def test_the_random_numbers_are_an_argument():
    network = build()
    drawn = []
    for _ in range(2):
        initialise_step_sizes(network, (1e-4, 1e-2), input_channels=1, generator=torch.Generator().manual_seed(7))
        drawn.append(torch.cat([scan.core.dt_bias.flatten() for scan in placed_scans(network, 1, PATCH)]))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("dt_init", "message"),
    [
        ({"spacing": [1, 1, 1]}, "needs patch_size"),
        ({"patch_size": PATCH, "patch": 1}, "needs patch_size"),
        ({"patch_size": PATCH, "spacing": [1, 1]}, "patch of 3 axes and a spacing of 2"),
        ({"patch_size": [15, 32, 32]}, "not divisible"),
        ((0.1, 0.01), "dt_range must"),
    ],
    ids=["no patch", "unknown key", "axes", "patch", "pair"],
)
def test_an_impossible_dt_init_is_refused(dt_init, message):
    with pytest.raises(ValueError, match=message):
        build(dt_init=dt_init)
