"""MSVM-UNet: the published 2D operators, exact parameter counts, plan shapes."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medmamba.layers import SS2D, FeedForward, LargeKernelExpand, VSSBlock
from medmamba.mixers.scan import ScanCore
from medmamba.networks import create_network
from medmamba.networks.unet import AddSkip, ConcatSkip
from medmamba_kernels.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
# The published float32 code itself is off by 2e-7 to 4e-5 against these float64 numbers; ours runs in float64.
TOLERANCE = 2e-6
SIX_STAGES = [[1, 1, 1]] + [[2, 2, 2]] * 5
FAITHFUL = [[1, 1, 1], [4, 4, 4], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
TINY = {"base_features": 8, "depths": 1, "decoder_depths": 1}

BLOCK = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "op.in_proj.weight": "ss2d.in_proj.weight",
    "op.conv2d.weight": "ss2d.conv.weight",
    "op.x_proj_weight": "ss2d.core.x_proj",
    "op.dt_projs_weight": "ss2d.core.dt_proj",
    "op.dt_projs_bias": "ss2d.core.dt_bias",
    "op.A_logs": "ss2d.core.A_log",
    "op.Ds": "ss2d.core.D",
    "op.out_norm.weight": "ss2d.norm.weight",
    "op.out_norm.bias": "ss2d.norm.bias",
    "op.out_proj.weight": "ss2d.out_proj.weight",
    "norm2.weight": "ffn_norm.weight",
    "norm2.bias": "ffn_norm.bias",
    "mlp.fc1.weight": "ffn.fc1.weight",
    "mlp.fc1.bias": "ffn.fc1.bias",
    "mlp.multiscale_conv.dw_convs.0.weight": "ffn.convs.0.weight",
    "mlp.multiscale_conv.dw_convs.1.weight": "ffn.convs.1.weight",
    "mlp.multiscale_conv.dw_convs.2.weight": "ffn.convs.2.weight",
    "mlp.fc2.weight": "ffn.fc2.weight",
    "mlp.fc2.bias": "ffn.fc2.bias",
}
EXPAND = {
    "expand.0.weight": "conv.weight",
    "expand.0.bias": "conv.bias",
    "expand.1.weight": "expand_norm.weight",
    "expand.1.bias": "expand_norm.bias",
    "expand.3.weight": "depthwise.weight",
    "expand.3.bias": "depthwise.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
# A flat axis of a volume and the two rasters of the plane, in VMamba's order.
PLANES = {
    "image": ("raster4", None),
    "D = 1": (["dhw", "dwh", "dhw:reverse", "dwh:reverse"], 0),
    "H = 1": (["hdw", "hwd", "hdw:reverse", "hwd:reverse"], 1),
    "W = 1": (["wdh", "whd", "wdh:reverse", "whd:reverse"], 2),
}


def golden(name: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items() if k != "meta"}


def in_plane(weight_3d: torch.Tensor, flat: int | None) -> torch.Tensor:
    """The centre slice of a kernel along the flat axis: what acts on a plane."""
    return weight_3d if flat is None else weight_3d.select(2 + flat, weight_3d.shape[2 + flat] // 2)


def load(layer: nn.Module, names: dict[str, str], numbers, prefix: str, flat: int | None) -> None:
    """Published weights into ours; a kernel of a volume holds them in the plane and zeros beside it."""
    parameters = dict(layer.named_parameters())
    assert sorted(names.values()) == sorted(parameters)
    with torch.no_grad():
        for theirs, ours in names.items():
            value, target = numbers[f"w:{prefix}{theirs}"].double(), parameters[ours]
            if target.dim() == 5:
                target.zero_()
                target = in_plane(target, flat)
            target.copy_(value.view_as(target))


def assert_gradients(layer: nn.Module, names: dict[str, str], numbers, prefix: str, flat: int | None) -> None:
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    for theirs, ours in names.items():
        gradient, stored = gradients[ours], numbers[f"gw:{prefix}{theirs}"]
        gradient = in_plane(gradient, flat) if gradient.dim() == 5 else gradient
        assert_close(theirs, gradient.reshape(stored.shape), stored, 5e-6)


def plane_to_tokens(x: torch.Tensor, flat: int | None) -> torch.Tensor:
    """(B, C, H, W) of the file to our channels-last image, or volume that is flat along one axis."""
    x = x.double().movedim(1, -1)
    return x if flat is None else x.unsqueeze(1 + flat)


def tokens_to_plane(y: torch.Tensor, flat: int | None) -> torch.Tensor:
    return (y if flat is None else y.squeeze(1 + flat)).movedim(-1, 1)


@pytest.mark.parametrize("plane", PLANES)
def test_the_block_equals_the_published_one_on_images_and_flat_volumes(plane):
    numbers, (routes, flat) = golden("msvm_msvss"), PLANES[plane]
    ss2d = partial(SS2D, core=partial(ScanCore, d_state=1, routes=routes), expand=1.0, gate=False, conv_bias=False)
    kernel = [3] * (2 if flat is None else 3)
    block = VSSBlock(
        16, ss2d=ss2d, kernel_size=kernel, drop_path=0.0, feed_forward=partial(FeedForward, scales=(1, 3, 5))
    ).double()
    load(block, BLOCK, numbers, "blocks.0.", flat)
    seen = {}
    block.ss2d.act.register_forward_hook(lambda module, inputs, output: seen.update({"h:conv": output}))
    block.ss2d.norm.register_forward_hook(lambda module, inputs, output: seen.update({"h:core": output}))
    x = plane_to_tokens(numbers["x"], flat).requires_grad_()
    y = tokens_to_plane(block(x), flat)
    for name, value in (*seen.items(), ("y", y)):
        value = value if name == "y" else tokens_to_plane(value, flat)
        assert_close(name, value, numbers[name], TOLERANCE)
    (y * numbers["r"].double()).sum().backward()
    assert_close("gradient of x", tokens_to_plane(x.grad, flat), numbers["gx"], TOLERANCE)
    assert_gradients(block, BLOCK, numbers, "blocks.0.", flat)


@pytest.mark.parametrize("plane", PLANES)
def test_the_expansion_equals_the_published_one_on_images_and_flat_volumes(plane):
    numbers, flat = golden("msvm_lkpe"), PLANES[plane][1]
    stride = [2, 2] if flat is None else [1 if axis == flat else 2 for axis in range(3)]
    layer = LargeKernelExpand(16, 8, stride, [3] * len(stride), norm="batch").double().eval()
    load(layer, EXPAND, numbers, "", flat)
    layer.expand_norm.running_mean.copy_(numbers["w:expand.1.running_mean"])
    layer.expand_norm.running_var.copy_(numbers["w:expand.1.running_var"])
    x = plane_to_tokens(numbers["x"], flat).requires_grad_()
    y = tokens_to_plane(layer(x), flat)
    assert_close("y", y, numbers["y"], TOLERANCE)
    (y * numbers["r"].double()).sum().backward()
    assert_close("gradient of x", tokens_to_plane(x.grad, flat), numbers["gx"], TOLERANCE)
    assert_gradients(layer, EXPAND, numbers, "", flat)


def test_expanding_puts_channel_blocks_where_their_sub_pixel_is():
    layer = LargeKernelExpand(24, 2, (3, 2, 2), (1, 1, 1))
    layer.norm = layer.expand_norm = nn.Identity()
    with torch.no_grad():
        layer.conv.weight.copy_(torch.eye(24).view_as(layer.conv.weight))
        layer.depthwise.weight.fill_(1.0)
        layer.conv.bias.zero_()
        layer.depthwise.bias.zero_()
    expanded = layer(torch.arange(24.0).view(1, 1, 1, 1, 24))
    assert torch.equal(expanded[0], torch.arange(24.0).view(3, 2, 2, 2))


def test_with_one_sample_instance_and_batch_norm_are_the_same():
    instance, batch = (LargeKernelExpand(4, 2, (1, 2, 2), (1, 3, 3), norm=norm) for norm in ("instance", "batch"))
    batch.load_state_dict(instance.state_dict(), strict=False)
    x = torch.randn(1, 3, 4, 5, 4)
    torch.testing.assert_close(batch.train()(x), instance(x))


def test_a_single_voxel_is_expanded_rather_than_erased():
    layer = LargeKernelExpand(4, 2, (2, 2, 2), (3, 3, 3))
    one, other = layer.train()(torch.randn(2, 1, 1, 1, 4))
    assert one.shape == (2, 2, 2, 2)
    assert not torch.allclose(one, other)


def test_the_scales_are_one_convolution_with_the_same_result():
    layer = FeedForward(3, kernel_size=(3, 3, 3), ratio=2.0, scales=(1, 3, 5)).double()
    x = torch.randn(2, 4, 5, 6, 3, dtype=torch.float64)
    v = layer.act(layer.fc1(x))
    summed = v + sum(conv(v.movedim(-1, 1)).movedim(1, -1) for conv in layer.convs)
    torch.testing.assert_close(layer(x), layer.fc2(summed))


@pytest.mark.parametrize("kernel_size", [(1, 3, 3), (3, 3, 1), (1, 1, 1), (1, 3)], ids=str)
def test_the_scales_leave_out_what_the_plan_leaves_out(kernel_size):
    layer = FeedForward(2, kernel_size=kernel_size, scales=(1, 3, 5))
    kernels = [tuple(conv.weight.shape[2:]) for conv in layer.convs]
    assert kernels == [tuple(1 if k == 1 else scale for k in kernel_size) for scale in (1, 3, 5)]
    x = torch.randn(1, *[4] * len(kernel_size), 2)
    assert layer(x).shape == x.shape
    axis = kernel_size.index(1)
    changed = x.clone()
    changed.select(1 + axis, 0).add_(1.0)
    difference = (layer(changed) - layer(x)).abs().amax([i for i in range(x.dim()) if i != 1 + axis])
    assert difference[1:].max() == 0


def test_a_feed_forward_part_without_scales_is_an_mlp():
    layer = FeedForward(4, kernel_size=(3, 3, 3))
    assert [name for name, _ in layer.named_parameters()] == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


# Parameter counts: 8.4 of the architectures reference, restated.


def vss_parameters(d: int, routes: int, kernel: int, *, scales: int = 0, expand: int = 1) -> int:
    """2d + dE + k^n E + K E (2R + 3N + 2) + 2E + Ed + 8d^2 + 7d + 4d sum(k_i^n), with N = 1, R = ceil(d / 16)."""
    e, rank = expand * d, math.ceil(d / 16)
    scan = routes * e * (2 * rank + 3 + 2)
    return 2 * d + d * e + kernel * e + scan + 2 * e + e * d + 8 * d * d + 7 * d + 4 * d * scales


def conv_and_norm(a: int, b: int, kernel: int) -> int:
    return a * b * kernel + b + 2 * b


def expand_parameters(a: int, b: int, window: int, kernel: int) -> int:
    """1^n convolution, norm, depthwise convolution on prod(stride) * b channels; LayerNorm on b."""
    wide = b * window
    return a * wide + wide + 2 * wide + wide * kernel + wide + 2 * b


def native_sum(depths, routes: int, expand: int = 1) -> int:
    """Six isotropic stages, one channel, three classes; scans from the third, added skips above."""
    k, scales, widths = 27, 1 + 27 + 125, (32, 64, 128, 256, 320, 320)
    fine, deep = widths[:2], widths[2:]
    total = conv_and_norm(1, 32, k) + conv_and_norm(32, 64, k)
    total += sum(2 * 2 * conv_and_norm(width, width, k) for width in fine)  # encoder and decoder
    total += sum(n * vss_parameters(d, routes, k, expand=expand) for d, n in zip(deep, depths, strict=True))
    total += sum(2 * vss_parameters(d, routes, k, scales=scales, expand=expand) for d in deep[:-1])
    total += sum(conv_and_norm(a, b, k) for a, b in pairwise(widths[1:]))
    total += sum(expand_parameters(b, a, 8, k) for a, b in pairwise(deep))
    total += sum(2 * d * d + d for d in deep[:-1])  # after the concatenation
    total += sum(b * a * 8 + a for a, b in pairwise(widths[:3]))  # transposed convolutions
    return total + sum(3 * width + 3 for width in widths[:-1])


def faithful_sum(routes: int, channels: int, classes: int, ndim: int, *, two_steps=False, auxiliary=False) -> int:
    k, window, widths = 3**ndim, 2**ndim, (96, 192, 384, 768)
    scales = 1 + 3**ndim + 5**ndim
    total = conv_and_norm(channels, 48, k) + conv_and_norm(48, 96, k)
    total += sum(n * vss_parameters(d, routes, k) for d, n in zip(widths, (2, 2, 8, 2), strict=True))
    total += sum(conv_and_norm(a, b, k) for a, b in pairwise(widths))
    total += sum(2 * vss_parameters(d, routes, k, scales=scales) for d in widths[:-1])
    total += sum(expand_parameters(b, a, window, k) for a, b in pairwise(widths))
    total += sum(2 * d * d + d for d in widths[:-1])
    if two_steps:
        total += expand_parameters(96, 48, window, k) + expand_parameters(48, 24, window, k) + 24 * classes + classes
    else:
        total += expand_parameters(96, 96, window**2, k) + 96 * classes + classes
    return total + (sum(d * classes + classes for d in widths[:-1]) if auxiliary else 0)


def count(**arguments) -> int:
    channels, classes = arguments.pop("channels", 1), arguments.pop("classes", 3)
    with torch.device("meta"):
        network = create_network("msvmunet", channels, classes, **arguments)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "expected", "summed"),
    [
        ({}, 27_022_095, native_sum((2, 2, 8, 2), 6)),
        ({"depths": 2}, 20_286_735, native_sum((2, 2, 2, 2), 6)),
        ({"routes": "raster4"}, 26_579_215, native_sum((2, 2, 8, 2), 4)),
        ({"routes": "raster12"}, 28_350_735, native_sum((2, 2, 8, 2), 12)),
        ({"expand": 2.0}, 31_619_599, native_sum((2, 2, 8, 2), 6, expand=2)),
    ],
    ids=["default", "two blocks", "4 routes", "12 routes", "expand 2"],
)
def test_native_parameters_are_the_sum_of_the_pieces(arguments, expected, summed):
    assert count(strides=SIX_STAGES, **arguments) == expected == summed


@pytest.mark.parametrize(("two_steps", "expected"), [(False, 46_794_819), (True, 46_078_203)])
def test_faithful_parameters_are_the_sum_of_the_pieces(two_steps, expected):
    arguments = {"strides": FAITHFUL, "geometry": "faithful", "two_step_head": two_steps}
    published, with_heads = (count(**arguments, auxiliary_heads=heads) for heads in (False, True))
    assert published == expected == faithful_sum(6, 1, 3, 3, two_steps=two_steps)
    assert with_heads == faithful_sum(6, 1, 3, 3, two_steps=two_steps, auxiliary=True)


def test_the_two_dimensional_form_has_the_published_parameter_count():
    strides = [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]
    arguments = {"strides": strides, "geometry": "faithful", "auxiliary_heads": False, "channels": 3, "classes": 9}
    assert count(**arguments) == 35_925_513 == faithful_sum(4, 3, 9, 2)
    with torch.device("meta"):
        network = create_network("msvmunet", 3, 9, strides=strides, geometry="faithful")
    assert sum(p.numel() for p in network.encoder.parameters()) == 29_478_528


# From two to three dimensions.


def lifted_pair(plane: str, **arguments) -> tuple[nn.Module, nn.Module, int]:
    """A 2D network and a 3D one with the same weights that ignores the flat axis; BatchNorm, in eval mode."""
    routes, flat = PLANES[plane]
    flat = 0 if flat is None else flat
    torch.manual_seed(0)

    def across(pair) -> list[int]:
        return [*pair[:flat], 1, *pair[flat:]]

    strides, kernels = [[1, 1], [4, 4], [2, 2], [2, 2]], [[3, 3]] * 4
    shape = {"geometry": "faithful", "expand_norm": "batch", **TINY}
    image = create_network("msvmunet", 2, 3, strides=strides, kernel_sizes=kernels, **shape).double().eval()
    volume = create_network(
        "msvmunet",
        2,
        3,
        strides=[across(s) for s in strides],
        kernel_sizes=[across(k) for k in kernels],
        **{"routes": routes, **shape, **arguments},
    )
    volume = volume.double().eval()
    expected = volume.state_dict()
    volume.load_state_dict({key: value.view(expected[key].shape) for key, value in image.state_dict().items()})
    return image, volume, flat


@pytest.mark.parametrize("plane", [name for name in PLANES if name != "image"])
def test_a_flat_volume_is_segmented_as_an_image(plane):
    image, volume, flat = lifted_pair(plane)
    x = torch.randn(1, 2, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(volume(x.unsqueeze(2 + flat)).squeeze(2 + flat), image(x))


def test_scans_that_stay_in_their_plane_segment_slice_by_slice():
    routes = [f"{route}:reset=plane" for route in ("dhw", "dwh")]
    routes += [f"{route}:reverse:reset=plane" for route in ("dhw", "dwh")]
    image, volume, _ = lifted_pair("D = 1", routes=routes)
    x = torch.randn(1, 2, 3, 32, 32, dtype=torch.float64)
    slices = torch.stack([image(x[:, :, i]) for i in range(3)], dim=2)
    torch.testing.assert_close(volume(x), slices)


@pytest.mark.parametrize("geometry", ["native", "faithful"])
def test_kernels_and_scales_follow_the_plan_on_every_axis(geometry):
    thick = [[1, 3, 3], [1, 3, 3], [1, 3, 3], [3, 3, 3]]
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    if geometry == "faithful":
        strides[1] = [1, 4, 4]
    network = create_network("msvmunet", 1, 2, strides=strides, kernel_sizes=thick, geometry=geometry, **TINY)
    for name, parameter in network.named_parameters():
        last_stage = name.startswith(("encoder.stages.3", "encoder.downs.2", "decoder.ups.2"))
        if parameter.dim() == 5 and not last_stage:
            assert parameter.shape[2] == 1, name
        if name.endswith("depthwise.weight"):
            assert parameter.shape[2:] == ((3, 3, 3) if last_stage else (1, 3, 3)), name
    size = (4, 32, 32) if geometry == "faithful" else (4, 16, 16)
    assert network(torch.randn(1, 1, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize("first", [[4, 4, 4], [2, 4, 4], [1, 2, 2], [3, 3, 1], [6, 4, 2]], ids=str)
@pytest.mark.parametrize("two_step_head", [False, True])
def test_the_published_shape_takes_any_first_stride(first, two_step_head):
    strides = [[1, 1, 1], first, [2, 2, 2]]
    arguments = {"geometry": "faithful", "two_step_head": two_step_head, "deep_supervision": True, **TINY}
    network = create_network("msvmunet", 1, 2, strides=strides, **arguments)
    size = [4 * s for s in first]
    full, coarse = network(torch.randn(1, 1, *size))
    assert full.shape == (1, 2, *size)
    assert coarse.shape == (1, 2, 4, 4, 4)


# The shape of the network.


def blocks_per_stage(**arguments) -> list[int]:
    with torch.device("meta"):
        network = create_network("msvmunet", 1, 2, **arguments)
    return [sum(isinstance(m, VSSBlock) for m in stage.modules()) for stage in network.encoder.stages]


def test_eight_blocks_are_in_the_third_scan_stage_as_published():
    assert blocks_per_stage(strides=SIX_STAGES) == [0, 0, 2, 2, 8, 2]
    assert blocks_per_stage(strides=FAITHFUL, geometry="faithful") == [0, 2, 2, 8, 2]
    assert blocks_per_stage(strides=[*SIX_STAGES, [1, 2, 2]]) == [0, 0, 2, 2, 8, 2, 2]
    assert blocks_per_stage(strides=SIX_STAGES[:4]) == [0, 0, 2, 2]
    assert blocks_per_stage(strides=SIX_STAGES, depths=[1, 1, 3, 4, 5, 6]) == [0, 0, 3, 4, 5, 6]


def test_scan_levels_concatenate_their_skip_and_convolution_levels_add_it():
    with torch.device("meta"):
        network = create_network("msvmunet", 1, 2, strides=SIX_STAGES)
    assert [type(fuse) for fuse in network.decoder.fuses] == [AddSkip, AddSkip, ConcatSkip, ConcatSkip, ConcatSkip]


def test_only_the_decoder_has_several_scales():
    network = create_network("msvmunet", 1, 2, strides=SIX_STAGES[:4], **TINY)
    scales = {
        part: [len(m.convs) for m in getattr(network, part).modules() if isinstance(m, FeedForward)]
        for part in ("encoder", "decoder")
    }
    assert scales == {"encoder": [0, 0], "decoder": [3]}


def test_a_concatenated_skip_comes_second():
    fuse = ConcatSkip(2, 3)
    with torch.no_grad():
        fuse.project.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]).view(2, 4, 1, 1, 1))
        fuse.project.bias.zero_()
    x, skip = torch.randn(2, 1, 2, 3, 4, 5)
    assert torch.equal(fuse(x, skip), torch.stack([x[:, 0], skip[:, 1]], dim=1))


@pytest.mark.parametrize("geometry", ["native", "faithful"])
def test_drop_path_rises_to_the_bottom_and_falls_to_the_output(geometry):
    with torch.device("meta"):
        network = create_network(
            "msvmunet", 1, 3, strides=SIX_STAGES if geometry == "native" else FAITHFUL, geometry=geometry
        )
    rates = [m.drop_path.rate for m in network.encoder.modules() if isinstance(m, VSSBlock)]
    assert rates == pytest.approx([0.2 * i / 13 for i in range(14)])
    levels = [[m.drop_path.rate for m in s.modules() if isinstance(m, VSSBlock)] for s in network.decoder.stages]
    in_order_of_use = [rate for level in reversed(levels) for rate in level]
    assert in_order_of_use == pytest.approx([0.2, 0.16, 0.12, 0.08, 0.04, 0.0])


def test_without_auxiliary_heads_deep_supervision_has_one_output():
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    arguments = {"geometry": "faithful", "auxiliary_heads": False, "deep_supervision": True, **TINY}
    network = create_network("msvmunet", 1, 2, strides=strides, **arguments)
    outputs = network(torch.randn(1, 1, 8, 8, 8))
    assert [tuple(o.shape) for o in outputs] == [(1, 2, 8, 8, 8)]


def test_step_sizes_per_route_change_the_bias_only():
    def state(**arguments):
        torch.manual_seed(0)
        return create_network("msvmunet", 1, 2, strides=SIX_STAGES[:4], **TINY, **arguments).state_dict()

    default, other = state(), state(dt_init={"patch_size": [16, 32, 32], "spacing": [3.0, 1.0, 1.0]})
    changed = {key for key in default if not torch.equal(default[key], other[key])}
    assert changed == {key for key in default if key.endswith("dt_bias")} != set()


def test_the_control_has_every_parameter_but_the_scans():
    def names(mode: str) -> set[str]:
        with torch.device("meta"):
            network = create_network("msvmunet", 1, 2, strides=SIX_STAGES, ssm_mode=mode)
        return {name for name, _ in network.named_parameters()}

    assert names("identity") == {name for name in names("scan") if ".core." not in name}


WRONG = {
    "geometry": ({"geometry": "native3d"}, "unknown geometry 'native3d'; known: native, faithful"),
    "routes": ({"routes": "raster5"}, "unknown route set 'raster5'"),
    "norm": ({"expand_norm": "layer"}, "unknown norm 'layer' of the expansion; known: instance, batch"),
    "scales": ({"ffn_scales": [1, 4]}, "kernel sizes must be odd"),
    "depths": ({"depths": [2, 2, 8, 2]}, "depths must have 6 entries"),
    "decoder depths": ({"decoder_depths": [2, 2, 2]}, "decoder_depths must have 5 entries"),
    "decoder depths, faithful": (
        {"decoder_depths": [2] * 4, "geometry": "faithful", "strides": FAITHFUL},
        "decoder_depths must have 3 entries",
    ),
    "zero blocks": ({"depths": [2, 2, 2, 2, 2, 0]}, "at least 1"),
    "scan stage": ({"first_scan_stage": 9}, r"must lie in 1\.\.5"),
    "scan stage, faithful": ({"first_scan_stage": 2, "geometry": "faithful"}, "no meaning in the faithful"),
    "head, native": ({"two_step_head": True}, "no meaning in the native"),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradicting_arguments_are_named(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_network("msvmunet", 1, 2, **{"strides": SIX_STAGES, **arguments})
