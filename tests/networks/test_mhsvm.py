"""MHS-VM: the published 2D operators, the range of the gate's statistic, exact counts, what a control keeps."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medmamba.mixers import GatedFusion, MultiHeadCore, ScanCore, placed_scans, rescaled_threshold
from medmamba.networks import create_network
from medmamba.networks.mhsvm import IN_PLANE, IN_VOLUME, MHSBlock, routes_of_heads
from medmamba_kernels import Route, resolve_routes
from medmamba_kernels.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SIX_STAGES = [[1, 1, 1]] + [[2, 2, 2]] * 5
FAITHFUL = [[1, 1, 1], [4, 4, 4], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
TINY = {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2}
FOUR_STAGES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
# Their names inside a head -> ours.
HEAD = {
    "mambaeng.x_proj_weight": "x_proj",
    "mambaeng.dt_projs_weight": "dt_proj",
    "mambaeng.dt_projs_bias": "dt_bias",
    "mambaeng.A_logs": "A_log",
    "mambaeng.Ds": "D",
}
OURS = {
    "x_ssproj_W": "split_proj.weight",
    "cat_norm.weight": "norm.weight",
    "cat_norm.bias": "norm.bias",
    "y_proj.weight": "join_proj.weight",
    **{f"scanhead_{p}.{theirs}": f"heads.{i}.{ours}" for i, p in enumerate("CXS") for theirs, ours in HEAD.items()},
}


def numbers(name: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v).double() for k, v in np.load(GOLDEN / f"{name}.npz").items() if k != "meta"}


# The gate


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("routes", [4, 6, 12])
def test_the_gate_equals_the_published_one(routes, threshold):
    stored = numbers("mhsvm_gfu")
    y = GatedFusion(threshold)(stored[f"x_k{routes}"].movedim(2, 3))
    assert_close("y", y.movedim(1, 2), stored[f"y_k{routes}_t{threshold}"], 1e-6)


@given(
    st.integers(2, 12).flatmap(lambda k: st.lists(st.floats(-1e3, 1e3), min_size=k, max_size=k)).map(torch.tensor),
)
@settings(max_examples=200, deadline=None)
def test_the_statistic_is_bounded_by_the_number_of_routes(values):
    """cv of K numbers lies in [sqrt(K) / (K - 1), sqrt(K)], or below where they hardly differ."""
    y = values.double().view(1, -1, 1, 1)
    count, total = y.shape[1], y.sum()
    gated = GatedFusion(0.0)(y)
    low, high = math.sqrt(count) / (count - 1), math.sqrt(count)
    assert gated.abs() <= total.abs() * high * (1 + 1e-9)
    if (values - values.min()).mean() > 1:  # the 1e-5 in the denominator is then no matter
        assert gated.abs() >= total.abs() * low * (1 - 2e-5)


@pytest.mark.parametrize("routes", [2, 4, 6, 12])
def test_one_route_apart_from_equal_others_hits_both_ends(routes):
    below, above = torch.ones(1, routes, 1, 1).double(), torch.zeros(1, routes, 1, 1).double()
    below[:, 0], above[:, 0] = 0, 1
    below, above = below * 1e6, above * 1e6
    for y, end in ((below, math.sqrt(routes) / (routes - 1)), (above, math.sqrt(routes))):
        assert (GatedFusion(0.0)(y) / y.sum()).item() == pytest.approx(end, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, 3e4])
def test_equal_routes_give_zero_and_a_finite_gradient(value, dtype):
    y = torch.full((1, 6, 5, 3), value, dtype=dtype, requires_grad=True)
    out = GatedFusion(0.0)(y)
    out.sum().backward()
    assert not out.any()
    assert not y.grad.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1e-3, 1e6])
def test_values_and_gradients_stay_finite_at_any_scale(scale):
    torch.manual_seed(0)
    y = (torch.randn(1, 6, 50, 3) * scale).requires_grad_()
    out = GatedFusion(0.0)(y)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert bool(y.grad.isfinite().all())


def test_the_gradient_of_the_gate_is_that_of_its_values():
    torch.manual_seed(0)
    y = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GatedFusion(rescaled_threshold(0.5, 6)), (y,))


def test_the_gate_measures_disagreement_only():
    torch.manual_seed(0)
    gate, y = GatedFusion(0.0), torch.randn(1, 6, 40, 3, dtype=torch.float64) * 1e4
    gates = gate(y) / y.sum(1)
    for other in (y * 7, y + 1e4):
        torch.testing.assert_close(gate(other) / other.sum(1), gates, rtol=1e-7, atol=0)
    assert not torch.allclose(gate(-y) / -y.sum(1), gates, rtol=0.1)


def test_a_threshold_keeps_its_place_in_the_range():
    assert rescaled_threshold(0.5, 4) == 0.5
    assert rescaled_threshold(0.5, 6) == pytest.approx(0.367, abs=5e-4)
    assert rescaled_threshold(0.5, 12) == pytest.approx(0.236, abs=5e-4)
    for routes in (2, 4, 6, 8, 12):
        assert rescaled_threshold(2 / 3, routes) == pytest.approx(math.sqrt(routes) / (routes - 1))


def test_a_single_route_and_an_impossible_threshold_are_refused():
    with pytest.raises(ValueError, match="at least 2 routes, got 1; add the route's reverse"):
        GatedFusion(0.0)(torch.zeros(1, 1, 3, 2))
    with pytest.raises(ValueError, match="at least 2 routes, got 1"):
        create_network("mhsvm", 1, 2, strides=FOUR_STAGES, routes=["C", ["dhw"]])
    for threshold in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be a number of 0 or more"):
            create_network("mhsvm", 1, 2, strides=FOUR_STAGES, gate_threshold=threshold)


# The heads


def gated(width: int, *, threshold: float = 0.0, **kwargs) -> ScanCore:
    return ScanCore(width, fusion=GatedFusion(threshold), **kwargs)


def published_heads(stored, routes) -> MultiHeadCore:
    """Our mixer in float64 with the published weights, three heads."""
    mixer = MultiHeadCore(16, core=partial(gated, d_state=16), routes=routes).double()
    parameters = dict(mixer.named_parameters())
    assert set(OURS.values()) == set(parameters)
    with torch.no_grad():
        for theirs, ours in OURS.items():
            parameters[ours].copy_(stored[f"w:{theirs}"].view_as(parameters[ours]))
    return mixer


def in_another_plane(text: str, letters: dict[str, str]) -> Route:
    (route,) = resolve_routes([text])
    table = str.maketrans(letters)
    return Route(route.axes.translate(table), route.curve, route.reverse, route.flip.translate(table))


@pytest.mark.parametrize("flat", ["image", "H = 1", "W = 1"])
def test_heads_equal_the_published_module(flat):
    """Also in the planes D-W and D-H of a volume, with the published routes laid there."""
    stored = numbers("mhsvm_mhsm_d16_h3_t0.0")
    letters, grid = {
        "image": ({}, (1, 8, 12)),
        "H = 1": ({"d": "h", "h": "d"}, (8, 1, 12)),
        "W = 1": ({"d": "w", "h": "d", "w": "h"}, (8, 12, 1)),
    }[flat]
    routes = [
        [in_another_plane(str(route), letters) for route in resolve_routes(head)]
        for head in routes_of_heads(["C", "X", "S"], 2)
    ]
    mixer = published_heads(stored, routes)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for i, head in enumerate(mixer.heads):
        head.fusion.register_forward_hook(lambda _, inputs, out, i=i: seen.update({i: (inputs[0], out)}))
    x = stored["x"].flatten(2).mT.clone().requires_grad_()
    y = mixer(x, grid)
    for i, pattern in enumerate("CXS"):
        assert_close(f"routes of {pattern}", seen[i][0].mT, stored[f"h:ys_{pattern}"], 2e-6)
        assert_close(f"head {pattern}", seen[i][1].mT, stored[f"h:head_{pattern}"], 2e-6)
    assert_close("y", y, stored["y"].flatten(1, 2), 2e-6)
    (y * stored["r"].flatten(1, 2)).sum().backward()
    assert_close("gradient of x", x.grad.mT, stored["gx"].flatten(2), 5e-6)
    gradients = {name: p.grad for name, p in mixer.named_parameters()}
    for theirs, ours in OURS.items():
        expected = stored[f"gw:{theirs}"]
        assert_close(theirs, gradients[ours].reshape(expected.shape), expected, 5e-6)


def test_heads_share_what_a_width_can_give():
    mixer = MultiHeadCore(16, core=partial(gated, d_state=2), routes=["mhs_c4"] * 3)
    assert mixer.head_width == 5
    assert mixer(torch.randn(2, 12, 16), (1, 3, 4)).shape == (2, 12, 16)
    for count in (0, 17):
        with pytest.raises(ValueError, match=f"{count} heads cannot share 16 channels"):
            MultiHeadCore(16, core=partial(gated, d_state=2), routes=["mhs_c4"] * count)


@pytest.mark.parametrize("name", [*IN_PLANE.values(), *IN_VOLUME.values()])
def test_a_route_is_followed_by_its_reverse(name):
    routes = resolve_routes(name)
    assert len(routes) == int(name[-1])
    assert len(set(routes)) == len(routes)
    assert list(routes[1::2]) == [route.reversed() for route in routes[::2]]
    if name in IN_PLANE.values():  # the order of the planes, the slowest axis, does not matter on one plane
        assert {route.axes[0] for route in routes} == {"d"}
    else:
        ends = {"C": -1, "Z": -1, "S": 0, "X": 0}[name[4].upper()]
        assert sorted(route.axes[ends] for route in routes[::2]) == ["d", "h", "w"]


@pytest.mark.parametrize(
    ("routes", "ndim", "expected"),
    [
        (None, 3, ["mhs_c6", "mhs_x6", "mhs_s6", "mhs_z6"]),
        (None, 2, ["mhs_c4", "mhs_x4", "mhs_s4", "mhs_z4"]),
        (["C", "Z"], 3, ["mhs_c6", "mhs_z6"]),
        (["C", "raster6", ["dhw", "whd"]], 2, ["mhs_c4", "raster6", ["dhw", "whd"]]),
        ("raster12", 3, ["raster12"] * 4),
        ("C", 3, ["mhs_c6"] * 4),
    ],
    ids=str,
)
def test_routes_are_named_per_head(routes, ndim, expected):
    assert routes_of_heads(json.loads(json.dumps(routes)), ndim) == expected


def test_moving_axes_and_routes_together_moves_the_output():
    letters = {"d": "w", "h": "d", "w": "h"}  # new axes (d', h', w') = (h, w, d)
    first = [list(resolve_routes(name)) for name in IN_VOLUME.values()]
    second = [[in_another_plane(str(route), letters) for route in head] for head in first]
    mixers = [MultiHeadCore(8, core=partial(gated, d_state=2), routes=routes).double() for routes in (first, second)]
    mixers[1].load_state_dict(mixers[0].state_dict())
    x = torch.randn(1, 3, 4, 5, 8, dtype=torch.float64)
    y = mixers[0](x.reshape(1, 60, 8), (3, 4, 5)).view(x.shape)
    moved = mixers[1](x.permute(0, 2, 3, 1, 4).reshape(1, 60, 8), (4, 5, 3)).view(1, 4, 5, 3, 8)
    torch.testing.assert_close(moved, y.permute(0, 2, 3, 1, 4))


def test_half_precision_does_not_blur_what_sets_the_routes_apart():
    """At first D is 1 for every route, and the routes differ by less than bfloat16 resolves."""
    torch.manual_seed(0)
    core = gated(8, d_state=4, dt_rank=1, routes="mhs_c6")
    u = (0.03 * torch.randn(1, 64, 8)).bfloat16()
    exact = core.double()(u.double(), (4, 4, 4))
    core.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = core(u, (4, 4, 4))
    assert y.dtype == torch.float32
    assert_close("y", y.double(), exact, 0.03)


# The network


@pytest.mark.parametrize("has_out_projection", [False, True])
def test_a_block_is_gated_and_residual(has_out_projection):
    torch.manual_seed(0)
    mixer = partial(MultiHeadCore, core=partial(gated, d_state=2), routes=["mhs_c6", "mhs_z6"])
    block = MHSBlock(6, mixer=mixer, kernel_size=[1, 3, 3], drop_path=0.0, has_out_projection=has_out_projection)
    x = torch.randn(2, 3, 4, 5, 6)
    u, z = nn.functional.linear(nn.functional.layer_norm(x, [6]), block.in_proj.weight).split(6, -1)
    u = nn.functional.conv3d(u.movedim(-1, 1), block.conv.weight, block.conv.bias, padding=(0, 1, 1), groups=6)
    y = block.mixer(nn.functional.silu(u).movedim(1, -1).reshape(2, 60, 6), (3, 4, 5)).view(x.shape)
    y = nn.functional.layer_norm(y, [6]) * nn.functional.silu(z)
    y = nn.functional.linear(y, block.out_proj.weight) if has_out_projection else y
    torch.testing.assert_close(block(x), x + y)


@pytest.mark.parametrize("geometry", ["native", "faithful"])
def test_a_volume_of_depth_one_equals_the_image(geometry):
    torch.manual_seed(0)
    strides = [[1, 1], [2, 2] if geometry == "native" else [4, 4], [2, 2], [2, 2]]
    options = {**TINY, "geometry": geometry, "first_scan_stage": 2 if geometry == "native" else None}
    image = create_network("mhsvm", 2, 3, strides=strides, **options).double().eval()
    volume = create_network(
        "mhsvm",
        2,
        3,
        strides=[[1, *stride] for stride in strides],
        kernel_sizes=[[1, 3, 3]] * 4,
        routes=list(IN_PLANE.values()),
        **options,
    )
    volume = volume.double().eval()
    with torch.no_grad():
        theirs = image.state_dict()
        assert list(theirs) == list(volume.state_dict())
        volume.load_state_dict({key: theirs[key].view_as(value) for key, value in volume.state_dict().items()})
    x = torch.randn(1, 2, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(volume(x.unsqueeze(2)).squeeze(2), image(x))


def scan_parameters(s: int, routes: int, states: int = 16) -> int:
    """Architectures reference: K s (2R + 3N + 2), R = ceil(s / 16)."""
    return routes * s * (2 * math.ceil(s / 16) + 3 * states + 2)


def mhs_parameters(d: int, heads: int, routes: int, kernel: int) -> int:
    """Architectures reference: 4d + 2d^2 + (k^n + 1) d + 2 d n_h s + n_h S(K, s) + 2 n_h s, s = floor(d / n_h)."""
    s = d // heads
    joined = heads * s
    return 4 * d + 2 * d * d + (kernel + 1) * d + 2 * d * joined + heads * scan_parameters(s, routes) + 2 * joined


def conv_parameters(a: int, b: int, kernel: int) -> int:
    return a * b * kernel + b + 2 * b


def native_sum(heads: int, routes: int, channels: int = 1, classes: int = 3) -> int:
    """Six isotropic stages, MHS blocks from the third on, two blocks per stage."""
    widths = (32, 64, 128, 256, 320, 320)
    fine, deep = widths[:2], widths[2:]
    total = conv_parameters(channels, 32, 27) + conv_parameters(32, 64, 27)
    total += sum(2 * 2 * conv_parameters(width, width, 27) for width in fine)  # encoder and decoder
    total += sum(2 * mhs_parameters(width, heads, routes, 27) for width in (*deep, *deep[:-1]))
    total += sum(2 * 8 * a + 8 * a * b for a, b in pairwise(widths[1:]))  # merging
    total += sum(8 * a * b + 2 * a for a, b in pairwise(deep))  # expanding
    total += sum(b * a * 8 + a for a, b in pairwise(widths[:3]))  # transposed convolutions
    return total + sum(classes * width + classes for width in widths[:-1])


def faithful_sum(heads: int, routes: int, channels: int, classes: int, ndim: int, outputs=(24,)) -> int:
    kernel, widths, window, patch = 3**ndim, (96, 192, 384, 768), 2**ndim, 4**ndim
    total = channels * 96 * patch + 96 + 2 * 96
    total += sum(2 * mhs_parameters(d, heads, routes, kernel) for d in widths)
    total += sum(n * mhs_parameters(d, heads, routes, kernel) for d, n in zip(widths, (1, 2, 2, 2), strict=True))
    total += sum(2 * window * a + window * a * b for a, b in pairwise(widths))
    total += sum(window * a * b + 2 * a for a, b in pairwise(widths))
    total += 96 * 24 * patch + 2 * 24
    return total + sum(classes * width + classes for width in outputs)


def count(*arguments, **options) -> int:
    with torch.device("meta"):
        network = create_network("mhsvm", *arguments, **options)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("routes", "heads", "native", "faithful"),
    [
        (None, 4, 9_346_895, 21_335_451),
        (["C", "X", "S"], 3, 9_403_087, 21_528_987),
        (["C", "Z"], 2, 9_523_535, 21_919_515),
    ],
    ids=["four heads", "three heads", "C and Z"],
)
def test_parameters_are_the_sum_of_the_pieces(routes, heads, native, faithful):
    assert count(1, 3, strides=SIX_STAGES, routes=routes) == native == native_sum(heads, 6)
    options = {"strides": FAITHFUL, "geometry": "faithful", "routes": routes}
    assert count(1, 3, **options, auxiliary_heads=False) == faithful == faithful_sum(heads, 6, 1, 3, 3)
    assert count(1, 3, **options) == faithful_sum(heads, 6, 1, 3, 3, outputs=(24, 96, 192, 384))


@pytest.mark.parametrize(
    ("routes", "heads", "expected"), [(None, 4, 17_257_129), (["C", "X", "S"], 3, 17_386_153)], ids=["four", "three"]
)
def test_the_two_dimensional_form_has_the_published_parameter_count(routes, heads, expected):
    strides = [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]
    options = {"strides": strides, "geometry": "faithful", "auxiliary_heads": False, "routes": routes}
    assert count(3, 1, **options) == expected == faithful_sum(heads, 4, 3, 1, 2)


def test_an_out_projection_costs_its_square():
    widths = [width for width in (128, 256, 320, 320, 128, 256, 320) for _ in range(2)]
    without = count(1, 3, strides=SIX_STAGES)
    assert count(1, 3, strides=SIX_STAGES, out_projection=True) - without == sum(width**2 for width in widths)


def test_the_control_loses_the_scans_and_nothing_else():
    network = create_network("mhsvm", 1, 3, strides=FOUR_STAGES, **TINY)
    control = create_network("mhsvm", 1, 3, strides=FOUR_STAGES, ssm_mode="identity", **TINY)
    lost = {key: p.numel() for key, p in network.named_parameters() if key not in control.state_dict()}
    assert all(".heads." in key for key in lost)
    assert [key for key in network.state_dict() if key not in lost] == list(control.state_dict())
    assert sum(lost.values()) == sum(4 * scan_parameters(width // 4, 6, 2) for width in (32, 64, 32))
    (mixer,) = (m for m in control.encoder.stages[2].modules() if isinstance(m, MultiHeadCore))
    u = torch.randn(1, 8, 32)
    expected = mixer.join_proj(nn.functional.layer_norm(mixer.split_proj(u), [32]))
    torch.testing.assert_close(mixer(u, (2, 2, 2)), expected)


@pytest.mark.parametrize(("threshold", "open_low", "open_high"), [(0.0, 1.0, 1.0), (0.5, 0.0, 0.2)])
def test_at_the_start_the_gate_is_open_for_the_default_and_mostly_closed_for_a_half(threshold, open_low, open_high):
    """The routes of the finest stage differ by about 1e-6 of the volume's values then, and the 1e-5 decides."""
    torch.manual_seed(0)
    network = create_network("mhsvm", 1, 2, strides=SIX_STAGES[:5], gate_threshold=threshold).eval()
    gates = [m for m in network.encoder.stages[2].modules() if isinstance(m, GatedFusion)]
    shares = []
    for gate in gates:
        gate.register_forward_hook(lambda _, inputs, out: shares.append((out != 0).double().mean().item()))
    with torch.no_grad():
        network(torch.randn(1, 1, 32, 32, 32))
    assert len(shares) == 8
    assert all(open_low <= share <= open_high for share in shares)


def test_every_head_is_a_scan_of_its_own_for_the_reports():
    network = create_network("mhsvm", 1, 2, strides=FOUR_STAGES, **TINY)
    scans = placed_scans(network, 1, (32, 32, 16))
    assert len(scans) == 3 * 4
    first = [scan for scan in scans if scan.name.startswith("encoder.stages.2.")]
    assert [scan.grid for scan in first] == [(8, 8, 4)] * 4
    assert [scan.core.routes for scan in first] == [resolve_routes(name) for name in IN_VOLUME.values()]


@pytest.mark.parametrize(
    "dt_init", [(1e-4, 1e-2), {"patch_size": [32, 32, 16], "spacing": [1, 1, 3]}], ids=["pair", "route"]
)
def test_step_sizes_are_drawn_for_every_head(dt_init):
    states = []
    for chosen in (None, dt_init):
        torch.manual_seed(0)
        states.append(create_network("mhsvm", 1, 2, strides=FOUR_STAGES, dt_init=chosen, **TINY).state_dict())
    default, other = states
    changed = {key for key in default if not torch.equal(default[key], other[key])}
    assert changed == {key for key in default if key.endswith("dt_bias")}
    assert len(changed) == 12


WRONG = {
    "geometry": ({"geometry": "native3d"}, "unknown geometry 'native3d'; known: native, faithful"),
    "pattern": ({"routes": ["C", "Q"]}, "unknown route set 'Q'; known: .*mhs_c6"),
    "no head": ({"routes": []}, "an entry per head, got none"),
    "too many heads": ({"routes": ["C"] * 40, "base_features": 4}, "40 heads cannot share 16 channels"),
    "scan stage": ({"first_scan_stage": 9}, r"must lie in 1\.\.5"),
    "scan stage, faithful": ({"first_scan_stage": 2, "geometry": "faithful"}, "no meaning in the faithful"),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradicting_arguments_are_named(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_network("mhsvm", 1, 2, **{"strides": SIX_STAGES, **arguments})
