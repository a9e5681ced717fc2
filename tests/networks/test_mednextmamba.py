"""The MedNeXt hybrid: the published Mamba block, exact parameter counts, where and along what the layers scan."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medmamba.layers import ChannelNorm, SinCosPosition
from medmamba.mixers import IdentityCore, Mamba, MambaLayer, ScanCore, placed_scans
from medmamba.mixers.mamba import MambaDirection
from medmamba.networks import create_network, get_spec
from medmamba_kernels import ROUTE_SETS, parse_route
from medmamba_kernels.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FIVE_STAGES = [[1, 1, 1]] + [[2, 2, 2]] * 4
SIX_STAGES = [[1, 1, 1]] + [[2, 2, 2]] * 5
OURS = {
    "in_proj.weight": "in_proj.weight",
    "conv1d.weight": "directions.0.conv1d.weight",
    "conv1d.bias": "directions.0.conv1d.bias",
    "x_proj.weight": "directions.0.core.x_proj",
    "dt_proj.weight": "directions.0.core.dt_proj",
    "dt_proj.bias": "directions.0.core.dt_bias",
    "A_log": "directions.0.core.A_log",
    "D": "directions.0.core.D",
    "out_proj.weight": "out_proj.weight",
}
GRID = (3, 4, 5)


@pytest.fixture(scope="module")
def published():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "mamba1_block.npz").items() if k != "meta"}


def published_mamba(numbers, route: str) -> Mamba:
    mamba = Mamba(24, core=partial(ScanCore, d_state=16), routes=[route]).double()
    parameters = dict(mamba.named_parameters())
    assert set(parameters) == set(OURS.values())
    with torch.no_grad():
        for theirs, ours in OURS.items():
            parameters[ours].copy_(numbers[f"w:{theirs}"].double().view_as(parameters[ours]))
    return mamba


@pytest.mark.parametrize("route", ["dhw", "dhw:reverse", "wdh"])
def test_mamba_equals_the_published_block_along_any_line(published, route):
    mamba = published_mamba(published, route)
    # 37 tokens on the one axis that is fastest; a reversed route reads the reversed sequence.
    axis = 1 + "dhw".index(parse_route(route).axes[-1])
    flip = [1] if route.endswith("reverse") else []
    shape = [2, 1, 1, 1, 24]
    shape[axis] = 37
    x = published["x"].double().flip(flip).view(shape).requires_grad_()
    y = mamba(x)
    flat = y.view(2, 37, 24).flip(flip)
    assert_close("y", flat, published["y"], 2e-6)
    (flat * published["r"].double()).sum().backward()
    assert_close("gradient of x", x.grad.view(2, 37, 24).flip(flip), published["gx"], 2e-6)
    parameters = dict(mamba.named_parameters())
    for theirs, ours in OURS.items():
        stored = published[f"gw:{theirs}"]
        assert_close(theirs, parameters[ours].grad.view_as(stored), stored, 5e-6)


@pytest.mark.parametrize("route", [*ROUTE_SETS["raster12"], "dhw:snake", "hwd:hilbert", "whd:flip=w", "dhw:step=2x1x2"])
def test_the_convolution_is_causal_along_its_route(route):
    route = parse_route(route)
    torch.manual_seed(0)
    layer = MambaDirection(2, core=partial(ScanCore, d_state=1), dt_rank=1, conv_size=4, route=route).double()
    u = torch.randn(1, math.prod(GRID), 2, dtype=torch.float64)
    order = route.order(GRID)
    along = torch.cat([torch.zeros(1, 3, 2, dtype=torch.float64), u[:, order]], dim=1)
    windows = along.unfold(1, 4, 1)  # (1, L, E, 4)
    expected = (windows * layer.conv1d.weight[:, 0]).sum(-1) + layer.conv1d.bias
    torch.testing.assert_close(layer.convolve(u, GRID)[:, order], expected)


def test_a_token_changes_nothing_that_comes_before_it_on_the_route():
    mamba = Mamba(4, core=partial(ScanCore, d_state=2), routes=["hwd:reverse"]).double()
    order = parse_route("hwd:reverse").order(GRID)
    x = torch.randn(1, *GRID, 4, dtype=torch.float64)
    changed = x.clone()
    changed.view(-1, 4)[order[30]] += 1
    difference = (mamba(changed) - mamba(x)).view(-1, 4)[order].abs().amax(-1)
    assert not difference[:30].any()
    assert difference[30:].all()


def test_directions_add_up_under_one_gate():
    torch.manual_seed(0)
    both = Mamba(4, core=partial(ScanCore, d_state=2), routes="raster2").double()
    x = torch.randn(1, *GRID, 4, dtype=torch.float64)
    alone = []
    for k, route in enumerate(ROUTE_SETS["raster2"]):
        one = Mamba(4, core=partial(ScanCore, d_state=2), routes=[route]).double()
        one.load_state_dict(
            {key: both.state_dict()[key.replace("directions.0", f"directions.{k}")] for key in one.state_dict()}
        )
        alone.append(one(x))
    torch.testing.assert_close(both(x), sum(alone))


def test_images_are_volumes_of_depth_one():
    layer = MambaLayer(6, mamba=partial(Mamba, core=partial(ScanCore, d_state=2), routes="raster4"))
    image = torch.randn(2, 5, 7, 6)
    torch.testing.assert_close(layer(image.unsqueeze(1)).squeeze(1), layer(image))


@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 5, 2), (3, 5)], ids=str)
@pytest.mark.parametrize("width", [12, 13, 3])
def test_position_codes_are_sines_and_cosines_per_axis(grid, width):
    code = SinCosPosition()(torch.zeros(1, *grid, width, dtype=torch.float64))[0]
    per_axis = width // (2 * len(grid))
    for voxel in np.ndindex(*grid):
        angles = [[p / 10000 ** (i / per_axis) for i in range(per_axis)] for p in voxel]
        expected = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
        expected += [0.0] * (width - len(expected))
        torch.testing.assert_close(code[voxel], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_channel_norm_is_layer_norm_of_every_voxel():
    norm = ChannelNorm(6)
    x = torch.randn(2, 6, 3, 4, 5)
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(norm(x), centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt())


def mednext_parameters(a: int, b: int, kernel: int, ratio: int) -> int:
    """Architectures reference, 8.4: C k^3 + C + 2C + r C^2 + r C + r C C' + C'."""
    return a * kernel**3 + a + 2 * a + ratio * a * a + ratio * a + ratio * a * b + b


def mamba_parameters(d: int, routes: int, states: int = 16, conv: int = 4) -> int:
    """Architectures reference, 8.4: 4d + 2dE + K (E (conv + 1) + E (R + 2N) + E R + E + E N + E) + E d + 4 d^2 + 3d."""
    e, rank = 2 * d, math.ceil(d / 16)
    direction = e * (conv + 1) + e * (rank + 2 * states) + e * rank + e + e * states + e
    return 4 * d + 2 * d * e + routes * direction + e * d + 4 * d * d + 3 * d


def mednext_sum(widths, blocks, ratios) -> int:
    """Architectures reference, 5 and 8.4, kernel 3, one channel, three classes, a head per level but the deepest."""
    total = widths[0] + widths[0]
    for i, width in enumerate(widths):
        uses = 1 if i == len(widths) - 1 else 2
        total += uses * blocks[i] * mednext_parameters(width, width, 3, ratios[i])
    for i, (a, b) in enumerate(pairwise(widths)):
        total += mednext_parameters(a, b, 3, ratios[i + 1]) + mednext_parameters(b, a, 3, ratios[i]) + 2 * a * b + a + b
    return total + sum(3 * width + 3 for width in widths[:-1])


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("size", "blocks", "ratios", "expected"),
    [
        ("S", [2] * 6, [2] * 6, 10_959_471),
        ("B", [2] * 6, [2, 3, 4, 4, 4, 4], 16_601_103),
        ("M", [3, 4, 4, 4, 4, 4], [2, 3, 4, 4, 4, 4], 24_376_015),
        ("L", [3, 4, 8, 8, 8, 8], [3, 4, 8, 8, 8, 8], 73_616_751),
    ],
)
def test_native_parameters_are_mednext_and_four_mamba_layers(size, blocks, ratios, expected):
    with torch.device("meta"):
        network = create_network("mednextmamba", 1, 3, strides=SIX_STAGES, **get_spec("mednextmamba").presets[size])
    widths = (32, 64, 128, 256, 320, 320)
    layers = 4 * mamba_parameters(320, 2)
    assert layers == 4_591_360
    assert count(network) == expected == mednext_sum(widths, blocks, ratios) + layers
    scans = sum(count(m) for m in network.modules() if isinstance(m, MambaLayer))
    assert scans == layers


def test_by_default_it_is_size_b_and_k_6_costs_four_directions_more():
    with torch.device("meta"):
        default, six = (create_network("mednextmamba", 1, 3, strides=SIX_STAGES, routes=r) for r in (None, "raster6"))
    assert count(default) == 16_601_103
    assert count(six) - count(default) == 4 * (mamba_parameters(320, 6) - mamba_parameters(320, 2))


def published_sum(classes: int) -> int:
    """MambaMIM's network from its description: one channel, patch 96 cubed, one head."""
    channels = (32, 64, 128, 192, 384)
    total = 27 * channels[0] + channels[0]
    total += sum(27 * a * b + b for a, b in pairwise(channels))
    for width, ratio, blocks in ((64, 2, 2), (128, 4, 2), (192, 4, 2), (384, 4, 1)):
        total += blocks * mednext_parameters(width, width, 3, ratio)
    for width in channels[1:]:  # residual blocks on the skips: two convolutions, two LayerNorms
        total += 2 * (27 * width * width + width) + 2 * 2 * width
    total += 4 * mamba_parameters(384, 2) + 6**3 * 384  # with the backward weights and the position table
    for below, width in ((384, 384), (384, 192), (192, 128), (128, 64)):  # without biases, norms without weights
        total += 8 * below * width + 27 * 2 * width * width + 27 * width * width + 2 * width * width
    total += 27 * 64 * 32 + 32 + 27 * 32 * 32 + 32 + 64 * 32 + 32 + 3 * 2 * 32
    return total + 32 * classes + classes


def test_faithful_parameters_are_the_published_ones_but_for_the_position_table_and_the_heads():
    with torch.device("meta"):
        network = create_network("mednextmamba", 1, 3, strides=FIVE_STAGES, geometry="faithful")
    assert published_sum(3) == 41_840_771
    position_table, heads = 6**3 * 384, sum(3 * width + 3 for width in (128, 192, 384))
    assert count(network) == 41_840_771 - position_table + heads == 41_759_948
    # The released code runs one direction and never trains the weights of the other.
    with torch.device("meta"):
        one = create_network("mednextmamba", 1, 3, strides=FIVE_STAGES, geometry="faithful", routes=["dhw"])
    assert count(network) - count(one) == 4 * (mamba_parameters(384, 2) - mamba_parameters(384, 1)) == 316_416


def test_the_two_deepest_stages_scan_and_every_axis_is_fastest_in_turn():
    with torch.device("meta"):
        network = create_network("mednextmamba", 1, 2, strides=SIX_STAGES)
    found = [(scan.grid, *map(str, scan.core.routes)) for scan in placed_scans(network, 1, (128, 128, 64))]
    assert found == [
        *(((8, 8, 4), route) for route in ("dhw", "dhw:reverse", "dwh", "dwh:reverse")),
        *(((4, 4, 2), route) for route in ("hwd", "hwd:reverse", "dhw", "dhw:reverse")),
    ]


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ({}, [0, 0, 2, 2]),
        ({"first_scan_stage": 1, "mamba_depths": [1, 2, 3]}, [0, 1, 2, 3]),
        ({"first_scan_stage": 3, "mamba_depths": 5}, [0, 0, 0, 5]),
        ({"geometry": "faithful"}, [0, 0, 0, 4]),
        ({"geometry": "faithful", "mamba_depths": 1}, [0, 0, 0, 1]),
        ({"strides": SIX_STAGES[:2]}, [0, 2]),
    ],
    ids=str,
)
def test_layers_stand_where_they_are_asked_for(arguments, stages):
    with torch.device("meta"):
        network = create_network("mednextmamba", 1, 2, **{"strides": SIX_STAGES[:4], **arguments})
    found = [sum(isinstance(m, MambaLayer) for m in stage.modules()) for stage in network.encoder.stages]
    assert found == stages
    assert not any(isinstance(m, MambaLayer) for m in network.decoder.modules())


def test_the_control_keeps_everything_but_the_scan():
    with torch.device("meta"):
        scan, control = (
            create_network("mednextmamba", 1, 2, strides=SIX_STAGES, ssm_mode=mode) for mode in ("scan", "identity")
        )
    cores = [name for name, module in scan.named_modules() if isinstance(module, ScanCore)]
    assert len(cores) == 8
    assert cores == [name for name, module in control.named_modules() if isinstance(module, IdentityCore)]
    assert [k for k in scan.state_dict() if ".core." not in k] == list(control.state_dict())


@pytest.mark.parametrize("ssm_mode", ["dwconv", "lti", "shuffled", "windowed"])
@pytest.mark.parametrize("strides", [SIX_STAGES, [[1, 1]] + [[2, 2]] * 5], ids=["volume", "image"])
def test_matched_controls_have_the_parameters_of_the_scan(ssm_mode, strides):
    with torch.device("meta"):
        scan, control = (create_network("mednextmamba", 1, 3, strides=strides, ssm_mode=m) for m in ("scan", ssm_mode))
    assert count(control) == pytest.approx(count(scan), rel=0.02)
    scans, controls = ([m.core for m in n.modules() if hasattr(m, "core")] for n in (scan, control))
    for ours, theirs in zip(scans, controls, strict=True):  # a control may lack less than two weights per channel
        assert 0 <= count(ours) - count(theirs) < 2 * ours.D.shape[-1]


def test_the_way_back_of_a_shuffled_layer_is_reversed():
    with torch.device("meta"):
        network = create_network("mednextmamba", 1, 2, strides=SIX_STAGES[:4], ssm_mode="shuffled")
    routes = [str(route) for m in network.modules() if isinstance(m, ScanCore) for route in m.routes]
    assert routes == ["dhw:shuffle", "dhw:shuffle:reverse"] * 4


def test_a_convolution_in_the_place_of_the_scan_has_the_axes_of_the_plan():
    kernels = [[1, 3, 3]] * 3 + [[3, 3, 3]]
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2]]
    with torch.device("meta"):
        volume = create_network("mednextmamba", 1, 2, strides=strides, kernel_sizes=kernels, ssm_mode="dwconv")
        image = create_network("mednextmamba", 1, 2, strides=[[1, 1], [2, 2], [2, 2]], ssm_mode="dwconv")

    def kernels_of(stage: nn.Module) -> set[tuple[int, ...]]:
        return {m.core.conv.kernel_size for m in stage.modules() if hasattr(m, "core")}

    flat, cubic = (kernels_of(volume.encoder.stages[i]) for i in (2, 3))
    assert all(size[0] == 1 < size[1] for size in flat)
    assert all(size[0] == size[1] > 1 for size in cubic)
    assert all(len(size) == 2 for size in kernels_of(image.encoder.stages[2]))


def test_skips_and_upsampled_features_meet_in_the_published_order():
    network = create_network(
        "mednextmamba", 1, 2, strides=SIX_STAGES[:3], geometry="faithful", base_features=4, d_state=2
    )
    fuse = network.decoder.fuses[0]
    x, skip = torch.randn(1, 8, 4, 4, 4), torch.randn(1, 8, 4, 4, 4)
    joined = fuse(x, skip)
    assert torch.equal(joined[:, :8], x)
    assert torch.equal(joined[:, 8:], fuse.process(skip))


def test_linear_layers_start_as_in_the_release_and_step_sizes_in_mambas_range():
    torch.manual_seed(0)
    network = create_network("mednextmamba", 1, 2, strides=SIX_STAGES[:3], base_features=32)
    layer = next(m for m in network.modules() if isinstance(m, MambaLayer))
    bound = math.sqrt(6 / (64 + 256))
    assert layer.mamba.in_proj.weight.shape == (256, 64)
    assert 0.98 * bound < layer.mamba.in_proj.weight.abs().max() <= bound
    assert not layer.mlp[0].bias.any()
    dt = nn.functional.softplus(layer.mamba.directions[0].core.dt_bias)
    assert 0.9e-3 < dt.min() < dt.max() < 1.1e-1


def test_step_sizes_per_route_change_dt_bias_only():
    def build(dt_init=None):
        torch.manual_seed(0)
        return create_network("mednextmamba", 1, 2, strides=SIX_STAGES[:3], base_features=8, dt_init=dt_init)

    default, other = build(), build({"patch_size": [16, 16, 32], "spacing": [3.0, 1.0, 1.0]})
    before, after = default.state_dict(), other.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith("dt_bias")}


WRONG = {
    "geometry": ({"geometry": "native3d"}, "unknown geometry 'native3d'; known: native, faithful"),
    "routes": ({"routes": "raster5"}, "unknown route set 'raster5'"),
    "mamba depths": ({"mamba_depths": [1, 2, 3]}, "mamba_depths must have 2 entries"),
    "no layers": ({"mamba_depths": [1, 0]}, "mamba_depths must be at least 1"),
    "mamba depths, faithful": ({"mamba_depths": [1, 2], "geometry": "faithful"}, "mamba_depths must have 1 entries"),
    "scan stage": ({"first_scan_stage": 6}, r"must lie in 1\.\.5"),
    "scan stage, faithful": ({"first_scan_stage": 2, "geometry": "faithful"}, "no meaning in the faithful"),
    "widths, faithful": ({"features_per_stage": [8, 16], "geometry": "faithful"}, "must have 6 entries"),
    "checkpoint": ({"checkpoint_style": "inside"}, "unknown checkpoint_style 'inside'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradicting_arguments_are_named(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_network("mednextmamba", 1, 2, **{"strides": SIX_STAGES, **arguments})


def test_an_unknown_control_names_the_known_ones():
    with pytest.raises(KeyError, match=r"no ssm_mode 'none'; known: .*identity, .*scan"):
        create_network("mednextmamba", 1, 2, strides=SIX_STAGES, ssm_mode="none")
