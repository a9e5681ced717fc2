"""Laws of the routes: every route is a bijection, on cubic, odd, prime and size-1 grids."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba_kernels import ROUTE_SETS, Route, parse_route, resolve_routes
from medmamba_kernels.curves import CURVES, LINEWISE_CURVES, PLANEWISE_CURVES
from medmamba_kernels.routes import AXIS_ORDERS, route_table

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
GRIDS = [(1, 1, 1), (4, 4, 4), (2, 3, 5), (5, 7, 9), (1, 6, 5), (3, 1, 4), (4, 5, 1), (1, 1, 11), (13, 2, 3)]


def resets_of(curve: str) -> list[str]:
    resets = ["volume", "phase"]
    resets += ["plane"] if curve in PLANEWISE_CURVES else []
    return [*resets, *(["line"] if curve in LINEWISE_CURVES else []), "1", "5"]


# From splitmix64 in plain integers: sorted(range(8), key=...) of the signed 64-bit hashes of 1..8.
SHUFFLED_8 = [7, 0, 3, 2, 4, 6, 5, 1]

any_curve = st.sampled_from(sorted(CURVES))
any_route = any_curve.flatmap(
    lambda curve: st.builds(
        Route,
        axes=st.sampled_from(AXIS_ORDERS),
        curve=st.just(curve),
        reverse=st.booleans(),
        flip=st.sets(st.sampled_from("dhw")).map(lambda s: "".join(sorted(s))),
        reset=st.sampled_from(resets_of(curve)),
        step=st.tuples(*[st.integers(1, 3)] * 3),
    )
)
any_grid = st.tuples(*[st.integers(1, 9)] * 3)


def coordinates(order: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    return torch.stack(torch.unravel_index(order, grid), dim=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("curve", sorted(CURVES))
@pytest.mark.parametrize("axes", AXIS_ORDERS)
def test_a_route_visits_every_voxel_once(axes, curve, grid):
    order = Route(axes, curve).order(grid)
    assert torch.equal(order.sort().values, torch.arange(math.prod(grid)))


@given(route=any_route, grid=any_grid)
@settings(max_examples=150, deadline=None)
def test_any_route_has_an_inverse_and_resets_that_cut_it_into_whole_segments(route, grid):
    order, inverse, starts = route.order(grid), route.inverse(grid), route.starts(grid)
    tokens = torch.arange(math.prod(grid))
    assert torch.equal(order[inverse], tokens)
    assert torch.equal(inverse[order], tokens)
    assert bool(starts[0])
    if route.reset == "volume":
        assert int(starts.sum()) == 1


@given(route=any_route, grid=any_grid)
@settings(max_examples=80, deadline=None)
def test_the_reversed_route_is_the_path_walked_backwards(route, grid):
    assert torch.equal(route.reversed().order(grid), route.order(grid).flip(0))
    # The borders of the segments are the same places, seen from the other side.
    ends = torch.cat([route.starts(grid)[1:], torch.tensor([True])])
    assert torch.equal(route.reversed().starts(grid), ends.flip(0))


@given(route=any_route)
def test_a_route_survives_its_text_form(route):
    assert parse_route(str(route)) == route


@pytest.mark.parametrize("axes", AXIS_ORDERS)
@pytest.mark.parametrize("grid", [(2, 3, 4), (5, 1, 3)], ids=str)
def test_a_raster_equals_nested_loops(axes, grid):
    loops = [range(grid["dhw".index(axis)]) for axis in axes]
    expected = []
    for index in product(*loops):
        position = dict(zip(axes, index, strict=True))
        expected.append((position["d"] * grid[1] + position["h"]) * grid[2] + position["w"])
    assert Route(axes).order(grid).tolist() == expected


@pytest.mark.parametrize("curve", ["snake", "spiral"])
@pytest.mark.parametrize("axes", AXIS_ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_step_of_a_continuous_curve_is_one_voxel(curve, axes, grid):
    steps = coordinates(Route(axes, curve).order(grid), grid).diff(dim=0).abs()
    assert bool((steps.sum(1) == 1).all())


@pytest.mark.parametrize("grid", [(2, 2, 2), (4, 4, 4), (8, 8, 8), (1, 8, 8), (16, 1, 16)], ids=str)
def test_every_step_of_hilbert_is_one_voxel_on_powers_of_two(grid):
    steps = coordinates(Route(curve="hilbert").order(grid), grid).diff(dim=0).abs()
    assert bool((steps.sum(1) == 1).all())


def test_diagonal_steps_stay_on_neighbouring_diagonals():
    grid = (3, 5, 7)
    d, h, w = coordinates(Route(curve="diagonal").order(grid), grid).T
    assert bool(((h + w).diff().abs() <= 1).all())
    assert bool((d.diff() >= 0).all())


def test_zorder_reads_a_cube_in_blocks_of_two():
    d, h, w = coordinates(Route(curve="zorder").order((4, 4, 4)), (4, 4, 4)).T
    block = (d // 2 * 2 + h // 2) * 2 + w // 2
    assert block.tolist() == [b for b in range(8) for _ in range(8)]


@pytest.mark.parametrize("name", ["raster6", "snake6", "line6", "raster12"])
def test_the_sets_make_every_axis_fastest_equally_often(name):
    fastest = [route.axes[-1] for route in resolve_routes(ROUTE_SETS[name])]
    assert {fastest.count(axis) for axis in "dhw"} == {len(fastest) // 3}


def test_on_one_plane_raster4_is_the_published_order_of_two_dimensional_routes():
    height, width = 3, 4
    rows = torch.arange(height * width)
    columns = rows.view(height, width).T.reshape(-1)
    orders = [route.order((1, height, width)) for route in resolve_routes("raster4")]
    for got, expected in zip(orders, [rows, columns, rows.flip(0), columns.flip(0)], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        pytest.param(0, "dhw:snake", id="C0"),
        pytest.param(1, "dwh:snake", id="C1"),
        pytest.param(2, "dhw:diagonal", id="X0"),
        pytest.param(3, "dhw:diagonal:flip=w", id="X1"),
        pytest.param(4, "dhw:spiral", id="S0"),
        pytest.param(5, "dhw:spiral:flip=h", id="S1"),
        pytest.param(6, "dhw", id="Z0"),
        pytest.param(7, "dwh", id="Z1"),
    ],
)
def test_patterns_equal_the_published_tables(row, text):
    tables = np.load(GOLDEN / "mhsvm_routes.npz")
    for name in (key for key in tables.files if key.startswith("tables_")):
        height, width = (int(n) for n in name.removeprefix("tables_").split("x"))
        route, grid = parse_route(text), (1, height, width)
        np.testing.assert_array_equal(route.order(grid).numpy(), tables[name][row, 0], err_msg=name)
        np.testing.assert_array_equal(route.inverse(grid).numpy(), tables[name][row, 1], err_msg=name)


def test_atrous_phases_are_interleaved_sub_grids():
    order = parse_route("dhw:step=1x2x2").order((1, 4, 4))
    assert order[:4].tolist() == [0, 2, 8, 10]
    assert order[4:8].tolist() == [1, 3, 9, 11]


@pytest.mark.parametrize(("reset", "segments"), [("volume", 1), ("plane", 3), ("line", 12)])
def test_resets_cut_where_the_name_says(reset, segments):
    assert int(Route("wdh", reset=reset).starts((4, 5, 3)).sum()) == segments


def test_a_number_resets_after_so_many_tokens_of_the_route():
    starts = parse_route("hwd:reset=7").starts((2, 3, 4))
    assert starts.nonzero().flatten().tolist() == [0, 7, 14, 21]
    assert parse_route("hwd:reset=7:reverse").starts((2, 3, 4)).nonzero().flatten().tolist() == [0, 3, 10, 17]


def test_shuffle_is_the_same_order_everywhere():
    assert parse_route("dhw:shuffle").order((1, 2, 4)).tolist() == SHUFFLED_8
    order = parse_route("dhw:shuffle").order((7, 8, 9))
    assert abs(torch.corrcoef(torch.stack([order, torch.arange(504)]).double())[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dhx", "unknown axis order 'dhx'; known: dhw"),
        ("dhw:zigzag", "unknown option 'zigzag'.*known: .*hilbert"),
        ("dhw:reset=row", "unknown reset 'row'; known: volume"),
        ("dhw:reset=0", "unknown reset '0'; known: volume.*, or a number of tokens"),
        ("dhw:reset=-3", "unknown reset '-3'"),
        ("dhw:hilbert:reset=line", "has no lines"),
        ("dhw:zorder:reset=plane", "has no planes"),
        ("dhw:flip=x", "flip must name"),
        ("dhw:step=0x1x1", "step must be"),
        ("dhw:step=2", "step must be"),
    ],
)
def test_an_unknown_route_names_the_known_ones(text, message):
    with pytest.raises(ValueError, match=message):
        parse_route(text)


def test_an_unknown_set_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown route set 'raster7'; known: .*raster6"):
        resolve_routes("raster7")
    with pytest.raises(ValueError, match="at least one route"):
        resolve_routes([])


@pytest.mark.parametrize("grid", [(0, 2, 2), (2, 2), (1, -1, 3)], ids=str)
def test_a_grid_that_is_no_grid_is_refused(grid):
    with pytest.raises(ValueError, match=r"grid must be \(D, H, W\)"):
        Route().order(grid)


def test_tables_are_shared_between_calls():
    routes = resolve_routes("raster6")
    table = route_table(routes, (3, 4, 5))
    assert table is route_table(routes, (3, 4, 5))
    assert table.starts is None
    assert table.order.dtype == torch.int32
    assert table.order.shape == (6, 60)
