"""The choices of a block, each against what it says, written out by hand in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.layers import Place, places
from medmamba.mixers import IdentityCore, ScanCore
from medmamba.mixers.block import BlockOptions
from medmamba.mixers.block.assign import Grouped, Half, Streams
from medmamba.mixers.block.grids import Phases, Pooled, Profiles
from medmamba.mixers.block.merges import MERGES
from medmamba.mixers.block.tokens import token_mean
from medmamba.mixers.volume import TokenConv
from medmamba_kernels import resolve_routes

WIDTH = 6
ISOTROPIC = Place((3, 3, 3), (2, 2, 2), (1, 1, 1))
RASTERS = resolve_routes("raster6")


def scan(width, routes, fusion=None):
    return ScanCore(width, d_state=2, dt_rank=1, routes=[str(r) for r in routes], fusion=fusion).double()


def identity(width, routes, fusion=None):
    return IdentityCore(width, d_state=2, dt_rank=1, routes=[str(r) for r in routes])


def tokens(grid, width=WIDTH, batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, *grid, width, dtype=torch.float64).flatten(1, 3)


grids = st.tuples(*[st.integers(1, 5)] * 3)
steps = st.tuples(*[st.integers(1, 3)] * 3)


@given(grids, steps)
@settings(max_examples=40, deadline=None)
def test_phases_reach_every_voxel_of_any_grid_once(grid, step):
    phases = Phases(WIDTH, RASTERS, Place((3, 3, 3), step, (1, 1, 1)), identity)
    u = tokens(grid)
    assert torch.equal(phases(u, grid), u)


def test_a_phase_is_the_scan_of_its_sub_grid_cut_out():
    grid = (3, 4, 5)
    phases = Phases(WIDTH, RASTERS, ISOTROPIC, scan)
    u = tokens(grid)
    volume, y = u.unflatten(1, grid), phases(u, grid).unflatten(1, grid)
    for i, (d, h, w) in enumerate(itertools.product(range(2), repeat=3)):
        part = volume[:, d::2, h::2, w::2]
        core = phases.mixings[i]
        assert core.routes == (RASTERS[i % 6],)
        expected = core(part.flatten(1, 3), part.shape[1:4]).view(part.shape)
        torch.testing.assert_close(y[:, d::2, h::2, w::2], expected)


@pytest.mark.parametrize("grid", [(5, 7, 6), (1, 4, 3), (1, 1, 1)])
def test_a_pooled_grid_adds_the_enlarged_result_of_the_smaller_volume(grid):
    pooled = Pooled(WIDTH, RASTERS, ISOTROPIC, scan).double()
    u = tokens(grid)
    x = u.mT.unflatten(2, grid).contiguous()
    small = F.silu(F.conv3d(x, pooled.conv.weight, pooled.conv.bias, stride=2, padding=3, groups=WIDTH))
    v = pooled.pooled_norm(pooled.pooled(small.flatten(2).mT, tuple(small.shape[2:])))
    up = F.interpolate(v.mT.unflatten(2, small.shape[2:]), size=grid, mode="trilinear")
    assert (pooled.mixing.routes, pooled.pooled.routes) == (RASTERS[:1], RASTERS[1:])
    torch.testing.assert_close(pooled(u, grid), pooled.norm(pooled.mixing(u, grid)) + up.flatten(2).mT)


def test_thick_slices_are_not_pooled_and_the_coarsest_stage_reads_one_volume():
    thick = Pooled(WIDTH, RASTERS, Place((1, 3, 3), (1, 2, 2), (1, 1, 1)), scan)
    assert thick.conv.stride == (1, 2, 2)
    assert thick.conv.kernel_size == (1, 7, 7)
    coarsest = Pooled(WIDTH, RASTERS, Place((3, 3, 3), (1, 1, 1), (1, 1, 1)), scan)
    assert coarsest.mixing.routes == RASTERS


def test_profiles_are_scans_of_the_means_over_planes():
    grid = (3, 4, 5)
    profiles = Profiles(WIDTH, RASTERS, ISOTROPIC, scan)
    u = tokens(grid)
    volume = u.unflatten(1, grid)
    d, h, w = (
        mixing(volume.mean(across), (1, 1, n))
        for mixing, across, n in zip(profiles.mixings, [(2, 3), (1, 3), (1, 2)], grid, strict=True)
    )
    expected = d[:, :, None, None] + h[:, None, :, None] + w[:, None, None]
    torch.testing.assert_close(profiles(u, grid), expected.flatten(1, 3))


@pytest.mark.parametrize(("width", "groups"), [(12, None), (13, None), (7, 3), (6, 1)])
def test_groups_are_scans_of_slices_with_routes_of_their_own(width, groups):
    grid = (2, 3, 4)
    grouped = Grouped(width, RASTERS, scan, groups)
    u = tokens(grid, width)
    expected = [core(part, grid) for core, part in zip(grouped.mixings, u.split(grouped.widths, -1), strict=True)]
    torch.testing.assert_close(grouped(u, grid), torch.cat(expected, -1))
    assert sum(grouped.widths) == width
    assert sorted(str(route) for core in grouped.mixings for route in core.routes) == sorted(map(str, RASTERS))


def test_groups_that_are_too_many_are_refused():
    with pytest.raises(ValueError, match="7 groups cannot share 12 channels and 6 routes"):
        Grouped(12, RASTERS, scan, 7)


def test_one_half_is_scanned_and_the_other_weighted():
    grid = (2, 3, 4)
    half = Half(7, RASTERS, scan, None).double()
    u = tokens(grid, 7)
    weights = half.beside.attention(u[..., 4:], grid)
    expected = torch.cat([half.mixing(u[..., :4], grid), u[..., 4:] * weights], -1)
    torch.testing.assert_close(half(u, grid), expected)


@pytest.mark.parametrize(("axis", "route"), [(0, "hwd"), (1, "dwh"), (2, "dhw:reverse")])
def test_streams_take_turns_along_the_fastest_axis(axis, route):
    grid, streams = (2, 3, 4), 3
    woven = Streams(WIDTH, resolve_routes([route]), scan, streams)
    u = tokens(grid)
    longer = [n * streams if a == axis else n for a, n in enumerate(grid)]
    sequence = torch.zeros(2, *longer, WIDTH // streams, dtype=torch.float64)
    volume = u.unflatten(1, grid)
    take = [slice(None)] * 4
    for m in range(streams):
        take[axis + 1] = slice(m, None, streams)
        sequence[tuple(take)] = volume[..., 2 * m : 2 * m + 2]
    y = woven.mixings[0](sequence.flatten(1, 3), tuple(longer)).view(sequence.shape)
    expected = torch.zeros_like(volume)
    for m in range(streams):
        take[axis + 1] = slice(m, None, streams)
        expected[..., 2 * m : 2 * m + 2] = y[tuple(take)]
    torch.testing.assert_close(woven(u, grid), expected.flatten(1, 3))


@given(grids, st.sampled_from([1, 2, 3]))
@settings(max_examples=20, deadline=None)
def test_streams_come_home(grid, count):
    routes = RASTERS[:count]
    u = tokens(grid)
    torch.testing.assert_close(Streams(WIDTH, routes, identity, 2)(u, grid), count * u)


def test_merges_are_what_they_say():
    grid = (3, 4, 2)
    u = tokens(grid)

    def made(kind):
        torch.manual_seed(1)
        return MERGES[kind](WIDTH, RASTERS, scan).double()

    total = made("sum")(u, grid)
    torch.testing.assert_close(made("mean")(u, grid), total / 6)
    normed = made("norm_sum")
    parts = [norm(core(u, grid)) for core, norm in zip(normed.cores, normed.after, strict=True)]
    torch.testing.assert_close(normed(u, grid), torch.stack(parts).sum(0))
    joined = made("concat")
    weight = torch.cat([linear.weight for linear in joined.after], 1)
    expected = F.linear(torch.cat([core(u, grid) for core in joined.cores], -1), weight)
    torch.testing.assert_close(joined(u, grid), expected)
    cascade = made("cascade")
    assert [tuple(map(str, core.routes)) for core in cascade.cores] == [
        ("dhw", "dhw:reverse"),
        ("dwh", "dwh:reverse"),
        ("hwd", "hwd:reverse"),
    ]
    v = u
    for norm, core in zip(cascade.norms, cascade.cores, strict=True):
        v = v + core(norm(v), grid)
    torch.testing.assert_close(cascade(u, grid), v)


def test_a_convolution_of_tokens_is_the_convolution_of_the_volume():
    grid = (3, 4, 5)
    conv = TokenConv(WIDTH, (1, 3, 3)).double()
    u = tokens(grid)
    expected = F.conv3d(u.mT.unflatten(2, grid), conv.conv.weight, conv.conv.bias, padding=(0, 1, 1), groups=WIDTH)
    torch.testing.assert_close(conv(u, grid), expected.flatten(2).mT)


def test_the_mean_counts_tokens_that_take_part():
    u = tokens((1, 1, 4))
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    mean = token_mean(u, mask)
    torch.testing.assert_close(mean[0, 0], (u[0, 0] + u[0, 2]) / 2)
    assert not mean[1].any()


def test_places_follow_the_plan():
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 1]]
    kernels = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]
    first, second, third, last = places(strides, kernels, first=1)
    assert first.pool == (1, 2, 2)
    assert (second.pool, second.scale, second.depth) == ((2, 2, 2), (1, 2, 2), 0)
    assert (third.depth, third.is_deepest, third.kernel(5)) == (1, False, (5, 5, 5))
    assert (last.pool, last.scale, last.depth, last.is_deepest) == ((1, 1, 1), (4, 8, 4), 2, True)
    assert second.kernel(7) == (1, 7, 7)
    assert places(strides, kernels, first=1, skipped=1) == [second, third, last]


def test_routes_follow_the_place():
    thick = Place((1, 3, 3), (1, 2, 2), (1, 1, 1))
    image = Place((3, 3), (2, 2), (1, 1))

    def routes(place, **options):
        return [str(route) for route in BlockOptions(**options).routes_at(place)]

    assert routes(ISOTROPIC) == [str(route) for route in RASTERS]
    assert routes(image) == ["dhw", "dwh", "dhw:reverse", "dwh:reverse"]
    assert len(routes(image, routes="line")) == 4
    assert routes(thick, routes="strided") == ["dhw", "dhw:step=1x2x2"]
    assert routes(thick, keep_thick=False) == ["dhw", "dwh", "dhw:reverse", "dwh:reverse"]
    assert routes(thick, keep_thick=False, routes=["hwd"]) == ["hwd"]


def test_stages_change_the_choices_and_the_last_entry_holds_below():
    options = BlockOptions(stages=[{"d_state": 1}, {"d_state": 2}], deepest={"merge": "mean"})
    at = [options.at(Place((3, 3, 3), (2, 2, 2), (1, 1, 1), depth, depth == 3)) for depth in range(4)]
    assert [(o.d_state, o.merge) for o in at] == [(1, "sum"), (2, "sum"), (2, "sum"), (2, "mean")]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grids": "full"}, "a block has no option grids; known: assign, before"),
        ({"stages": [{"corn": 1}]}, "no option corn"),
        ({"grid": "hexagon"}, "no grid 'hexagon'; known: 'full', 'phase', 'pool', 'profile'"),
        ({"gate": "relu"}, "no gate 'relu'; known: 'linear', 'silu', null"),
        ({"core": None}, "without core and channel_mix does nothing"),
    ],
)
def test_what_no_block_has_is_refused_with_what_there_is(options, text):
    with pytest.raises(ValueError, match=text):
        BlockOptions.from_mapping(options)
