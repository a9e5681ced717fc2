"""VM-UNet: the published 2D operator, exact parameter counts, plan shapes."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba.layers import SS2D, VSSBlock
from medmamba.mixers.scan import ScanCore
from medmamba.networks import create_network
from medmamba_kernels.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SIX_STAGES = [[1, 1, 1]] + [[2, 2, 2]] * 5
FAITHFUL = [[1, 1, 1], [4, 4, 4], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
OURS = {
    "in_proj.weight": "in_proj.weight",
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "x_proj_weight": "core.x_proj",
    "dt_projs_weight": "core.dt_proj",
    "dt_projs_bias": "core.dt_bias",
    "A_logs": "core.A_log",
    "Ds": "core.D",
    "out_norm.weight": "norm.weight",
    "out_norm.bias": "norm.bias",
    "out_proj.weight": "out_proj.weight",
}


@pytest.fixture(scope="module")
def ss2d_numbers():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "vmunet_ss2d.npz").items() if k != "meta"}


def published_ss2d(numbers, *, ndim: int, routes, copies: int = 1) -> SS2D:
    """Our operator in float64 with the published weights; 3D kernels hold them in their centre slice.

    ``copies`` repeats the weights of every route, for route sets in which several routes fall onto one.
    """
    core = partial(ScanCore, d_state=16, routes=routes)
    layer = SS2D(16, core=core, kernel_size=[3] * ndim, expand=2.0).double()
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        for theirs, ours in OURS.items():
            value = numbers[f"w:{theirs}"].double()
            target = parameters[ours]
            if ours.startswith("core."):
                value = value.view(4, *target.shape[1:]).repeat_interleave(copies, 0)
            if ours == "conv.weight" and ndim == 3:
                target.zero_()
                target = target[:, :, 1]
            target.copy_(value.view_as(target))
    return layer


@pytest.mark.parametrize("axis", ["image", "D = 1", "H = 1", "W = 1"])
def test_ss2d_equals_the_published_operator_on_images_and_flat_volumes(ss2d_numbers, axis):
    x = ss2d_numbers["x"].double()
    if axis == "image":
        layer, shaped, flat = published_ss2d(ss2d_numbers, ndim=2, routes="raster4"), x, x.shape
    else:
        # The two in-plane rasters of a volume that is flat along another axis.
        routes = {
            "D = 1": ["dhw", "dwh", "dhw:reverse", "dwh:reverse"],
            "H = 1": ["hdw", "hwd", "hdw:reverse", "hwd:reverse"],
            "W = 1": ["wdh", "whd", "wdh:reverse", "whd:reverse"],
        }[axis]
        layer = published_ss2d(ss2d_numbers, ndim=3, routes=routes)
        position = 1 + "DHW".index(axis[0])
        with torch.no_grad():  # put the 2D kernel into the plane of the volume
            kernel = layer.conv.weight[:, :, 1].clone()
            layer.conv.weight.zero_()
            layer.conv.weight.select(position + 1, 1).copy_(kernel)
        shaped, flat = x.unsqueeze(position), x.shape
    shaped = shaped.clone().requires_grad_()
    y = layer(shaped)
    assert_close("y", y.view(flat), ss2d_numbers["y"], 2e-6)
    (y.view(flat) * ss2d_numbers["r"].double()).sum().backward()
    assert_close("gradient of x", shaped.grad.view(flat), ss2d_numbers["gx"], 2e-6)
    if axis == "image":
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        for theirs, ours in OURS.items():
            stored = ss2d_numbers[f"gw:{theirs}"]
            assert_close(theirs, gradients[ours].reshape(stored.shape), stored, 5e-6)


def test_routes_are_merged_back_in_the_published_order(ss2d_numbers):
    layer = published_ss2d(ss2d_numbers, ndim=2, routes="raster4")
    conv = ss2d_numbers["h:conv"].double()
    captured = {}
    layer.norm.register_forward_pre_hook(lambda module, args: captured.update(y=args[0]))
    layer(ss2d_numbers["x"].double())
    merged = ss2d_numbers["h:routes"].double().sum(1)
    assert_close("sum of routes", captured["y"].reshape(2, -1, 32).mT, merged, 2e-6)
    assert conv.shape == (2, 32, 9, 13)


def test_twelve_rasters_with_tied_weights_change_nothing_on_one_plane(ss2d_numbers):
    """All 12 rasters fall onto the 4 of a plane, three each; LayerNorm removes the factor 3."""
    tied = [
        *["dhw", "hdw", "hwd"],
        *["dwh", "wdh", "whd"],
        *["dhw:reverse", "hdw:reverse", "hwd:reverse"],
        *["dwh:reverse", "wdh:reverse", "whd:reverse"],
    ]
    layer = published_ss2d(ss2d_numbers, ndim=3, routes=tied, copies=3)
    y = layer(ss2d_numbers["x"].double().unsqueeze(1)).squeeze(1)
    assert_close("y", y, ss2d_numbers["y"], 1e-4)


def test_depth_folded_into_the_batch_is_slice_by_slice(ss2d_numbers):
    layer = published_ss2d(ss2d_numbers, ndim=2, routes="raster4")
    volume = torch.randn(3, 4, 5, 16, dtype=torch.float64)
    together = layer(volume)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], layer(volume[i : i + 1]))


def test_moving_axes_and_routes_together_moves_the_output():
    core = partial(ScanCore, d_state=2, routes=["dhw", "wdh:reverse"])
    layer = SS2D(4, core=core, kernel_size=[3, 3, 3], expand=2.0).double()
    moved = SS2D(4, core=partial(ScanCore, d_state=2, routes=["wdh", "hwd:reverse"]), kernel_size=[3] * 3, expand=2.0)
    moved = moved.double()
    moved.load_state_dict(layer.state_dict())
    with torch.no_grad():
        moved.conv.weight.copy_(layer.conv.weight.permute(0, 1, 3, 4, 2))
    x = torch.randn(1, 3, 4, 5, 4, dtype=torch.float64)
    # New axes (d', h', w') = (h, w, d): old d is new w, old h is new d, old w is new h.
    torch.testing.assert_close(moved(x.permute(0, 2, 3, 1, 4)), layer(x).permute(0, 2, 3, 1, 4))


def vss_parameters(d: int, routes: int, kernel: int, states: int = 16) -> int:
    """Architectures reference: 2d + 2dE + (k^n + 1)E + K E (2R + 3N + 2) + 2E + Ed, with E = 2d, R = ceil(d / 16)."""
    e, rank = 2 * d, math.ceil(d / 16)
    return 2 * d + 2 * d * e + (kernel + 1) * e + routes * e * (2 * rank + 3 * states + 2) + 2 * e + e * d


def conv_parameters(a: int, b: int, kernel: int) -> int:
    return a * b * kernel + b + 2 * b


def merge_parameters(a: int, b: int, window: int) -> int:
    return 2 * window * a + window * a * b


def expand_parameters(a: int, b: int, window: int) -> int:
    return a * b * window + 2 * b


def native_sum(widths, routes: int, channels: int, classes: int) -> int:
    """Six isotropic stages, scans from the third, two blocks per stage."""
    k, fine, deep = 27, widths[:2], widths[2:]
    total = conv_parameters(channels, fine[0], k) + conv_parameters(fine[0], fine[1], k)
    total += sum(2 * 2 * conv_parameters(width, width, k) for width in fine)  # encoder and decoder
    total += sum(2 * vss_parameters(width, routes, k) for width in (*deep, *deep[:-1]))
    total += sum(merge_parameters(a, b, 8) for a, b in pairwise(widths[1:]))
    total += sum(expand_parameters(b, a, 8) for a, b in pairwise(deep))
    total += sum(b * a * 8 + a for a, b in pairwise(widths[:3]))  # transposed convolutions
    return total + sum(classes * width + classes for width in widths[:-1])


def faithful_sum(routes: int, channels: int, classes: int, ndim: int, heads) -> int:
    k, widths, window, patch = 3**ndim, (96, 192, 384, 768), 2**ndim, 4**ndim
    total = channels * 96 * patch + 96 + 2 * 96
    total += sum(2 * vss_parameters(d, routes, k) for d in widths)
    total += sum(merge_parameters(a, b, window) for a, b in pairwise(widths))
    total += sum(n * vss_parameters(d, routes, k) for d, n in zip(widths, (1, 2, 2, 2), strict=True))
    total += sum(expand_parameters(b, a, window) for a, b in pairwise(widths))
    total += expand_parameters(96, 24, patch)
    return total + sum(classes * width + classes for width in heads)


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("routes", "number", "expected"),
    [("raster6", 6, 13_601_103), ("raster4", 4, 12_438_863), ("raster12", 12, 17_087_823)],
)
def test_native_parameters_are_the_sum_of_the_pieces(routes, number, expected):
    with torch.device("meta"):
        network = create_network("vmunet", 1, 3, strides=SIX_STAGES, routes=routes)
    assert count(network) == expected == native_sum((32, 64, 128, 256, 320, 320), number, 1, 3)


@pytest.mark.parametrize(
    ("routes", "number", "expected"),
    [("raster6", 6, 33_540_507), ("raster4", 4, 30_845_595), ("raster12", 12, 41_625_243)],
)
def test_faithful_parameters_are_the_sum_of_the_pieces(routes, number, expected):
    with torch.device("meta"):
        published, with_heads = (
            create_network("vmunet", 1, 3, strides=FAITHFUL, routes=routes, geometry="faithful", auxiliary_heads=heads)
            for heads in (False, True)
        )
    assert count(published) == expected == faithful_sum(number, 1, 3, 3, heads=(24,))
    assert count(with_heads) == faithful_sum(number, 1, 3, 3, heads=(24, 96, 192, 384))


def test_the_two_dimensional_form_has_the_published_parameter_count():
    strides = [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]
    with torch.device("meta"):
        network = create_network("vmunet", 3, 1, strides=strides, geometry="faithful", auxiliary_heads=False)
    assert count(network) == 27_427_561 == faithful_sum(4, 3, 1, 2, heads=(24,))


def test_scan_stages_begin_at_stride_four():
    def scans(strides) -> list[bool]:
        with torch.device("meta"):
            network = create_network("vmunet", 1, 2, strides=strides)
        return [any(isinstance(m, VSSBlock) for m in stage.modules()) for stage in network.encoder.stages]

    assert scans(SIX_STAGES) == [False, False, True, True, True, True]
    assert scans([[1, 1], [2, 2], [2, 2], [2, 2]]) == [False, False, True, True]
    # Thick slices: in-plane pooling first, so one more stage passes before the token budget is met.
    assert scans([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]) == [False, False, False, True, True]
    # A shallow plan still scans at its bottom.
    assert scans([[1, 1, 1], [2, 2, 2]]) == [False, True]


@pytest.mark.parametrize("geometry", ["native", "faithful"])
def test_drop_path_rises_to_the_bottom_and_falls_to_the_output(geometry):
    strides = SIX_STAGES if geometry == "native" else FAITHFUL
    with torch.device("meta"):
        network = create_network("vmunet", 1, 3, strides=strides, geometry=geometry, drop_path_rate=0.2)
    rates = [m.drop_path.rate for m in network.encoder.modules() if isinstance(m, VSSBlock)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, pytest.approx(0.2))
    by_level = [
        [m.drop_path.rate for m in stage.modules() if isinstance(m, VSSBlock)] for stage in network.decoder.stages
    ]
    in_order_of_use = [rate for level in reversed(by_level) for rate in level]
    assert in_order_of_use == sorted(in_order_of_use, reverse=True)
    assert (in_order_of_use[0], in_order_of_use[-1]) == (pytest.approx(0.2), 0.0)


def test_the_published_finest_skip_is_unused():
    network = create_network(
        "vmunet", 1, 2, strides=FAITHFUL, geometry="faithful", base_features=8, d_state=2, depths=1
    ).eval()
    features = network.encoder(torch.randn(1, 1, 32, 32, 32))
    before = network.decoder(features)
    features[0] = torch.full_like(features[0], float("nan"))
    assert torch.equal(network.decoder(features), before)


WRONG = {
    "geometry": ({"geometry": "native3d"}, "unknown geometry 'native3d'; known: native, faithful"),
    "routes": ({"routes": "raster5"}, "unknown route set 'raster5'"),
    "depths": ({"depths": [2, 2]}, "depths must have 6 entries"),
    "zero blocks": ({"depths": [2, 2, 2, 2, 2, 0]}, "at least 1"),
    "widths": ({"features_per_stage": [8, 16]}, "features_per_stage must have 6 entries"),
    "kernels": ({"kernel_sizes": [[3, 3, 3]]}, "kernel_sizes must have 6 entries"),
    "scan stage": ({"first_scan_stage": 9}, r"must lie in 1\.\.5"),
    "scan stage, faithful": ({"first_scan_stage": 2, "geometry": "faithful"}, "no meaning in the faithful"),
    "first stride": ({"strides": [[2, 2, 2], [2, 2, 2]]}, r"strides\[0\] must be ones"),
    "mixed strides": ({"strides": [[1, 1, 1], [2, 2]]}, "all have 2 or all have 3"),
    "one stage": ({"strides": [[1, 1, 1]]}, "at least two stages"),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradicting_arguments_are_named(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_network("vmunet", 1, 2, **{"strides": SIX_STAGES, **arguments})


def test_an_unknown_control_names_the_known_ones():
    with pytest.raises(KeyError, match=r"no ssm_mode 'none'; known: .*identity, .*scan"):
        create_network("vmunet", 1, 2, strides=SIX_STAGES, ssm_mode="none")
