"""MedNeXt: the published blocks, exact parameter counts, published weights key by key, UpKern."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medmamba.layers import InstanceGroupNorm, MedNeXtBlock, MedNeXtDown, MedNeXtUp, upkern
from medmamba.networks import create_network, get_spec
from medmamba.networks.mednext import convert_published
from medmamba_kernels.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FIVE_STAGES = [[1, 1, 1]] + [[2, 2, 2]] * 4
SIX_STAGES = [[1, 1, 1]] + [[2, 2, 2]] * 5
# Blocks and expansion per level of the released sizes: encoder from fine to coarse, bottleneck last.
RELEASED = {
    "S": ((2, 2, 2, 2, 2), (2, 2, 2, 2, 2)),
    "B": ((2, 2, 2, 2, 2), (2, 3, 4, 4, 4)),
    "M": ((3, 4, 4, 4, 4), (2, 3, 4, 4, 4)),
    "L": ((3, 4, 8, 8, 8), (3, 4, 8, 8, 8)),
}


def numbers(name: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items() if k != "meta"}


def weights_of(file: dict[str, torch.Tensor], prefix: str = "w:") -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value.double() for key, value in file.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("mednext_block_k3", lambda: MedNeXtBlock(8, [3] * 3, expansion=2)),
        ("mednext_up_k3", lambda: MedNeXtUp(16, 8, [2] * 3, [3] * 3, expansion=2)),
    ],
)
def test_blocks_equal_the_published_ones_values_and_gradients(name, build):
    file = numbers(name)
    block = build().double()
    block.load_state_dict(weights_of(file))
    x = file["x"].double().requires_grad_()
    y = block(x)
    assert_close("y", y, file["y"], 2e-6)
    (y * file["r"].double()).sum().backward()
    assert_close("gradient of x", x.grad, file["gx"], 2e-6)
    for key, parameter in block.named_parameters():
        if key == "conv1.bias":  # the norm behind it removes it: zero but for rounding
            torch.testing.assert_close(parameter.grad, file[f"gw:{key}"].double(), rtol=0, atol=1e-4)
        else:
            assert_close(key, parameter.grad, file[f"gw:{key}"], 5e-6)


@pytest.mark.parametrize("what", ["block", "up"])
def test_upkern_equals_the_published_interpolation(what):
    file = numbers("mednext_upkern")

    def build(kernel: int) -> torch.nn.Module:
        if what == "block":
            return MedNeXtBlock(8, [kernel] * 3, expansion=2).double()
        return MedNeXtUp(16, 8, [2] * 3, [kernel] * 3, expansion=2).double()

    x = file["x" if what == "block" else "x_up"].double()
    small, large = build(3), build(5)
    small.load_state_dict(weights_of(file, f"w:{what}3."))
    grown = upkern(small.state_dict(), large)
    for key, stored in weights_of(file, f"h:{what}5.").items():
        assert_close(key, grown[key], stored, 1e-6)
    large.load_state_dict(grown)
    assert_close("y, kernel 3", small(x), file[f"y_{what}3"], 2e-6)
    assert_close("y, kernel 5", large(x), file[f"y_{what}5"], 2e-6)


@pytest.mark.parametrize(
    "strides", [SIX_STAGES[:3], [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 1], [2, 2], [2, 2]]], ids=str
)
def test_upkern_of_a_network_changes_the_depthwise_kernels_only(strides):
    kernels = [[1, 3, 3], [3, 3, 3], [3, 3, 3]] if strides[1][0] == 1 and len(strides[0]) == 3 else None
    small, large = (
        create_network("mednext", 1, 2, strides=strides, kernel_sizes=kernels, base_features=4, kernel_size=k)
        for k in (3, 5)
    )
    grown = upkern(small.state_dict(), large)
    large.load_state_dict(grown)
    changed = {key for key, tensor in small.state_dict().items() if tensor.shape != grown[key].shape}
    assert changed
    assert all(key.endswith("conv1.weight") for key in changed)
    assert all(torch.equal(grown[key], small.state_dict()[key]) for key in grown if key not in changed)


def test_upkern_refuses_networks_that_differ_in_more_than_the_kernel():
    small = create_network("mednext", 1, 2, strides=FIVE_STAGES[:2], base_features=4)
    wide = create_network("mednext", 1, 2, strides=FIVE_STAGES[:2], base_features=8, kernel_size=5)
    deep = create_network("mednext", 1, 2, strides=FIVE_STAGES[:2], base_features=4, depths=3, kernel_size=5)
    with pytest.raises(ValueError, match="enlarges depthwise kernels and nothing else"):
        upkern(small.state_dict(), wide)
    with pytest.raises(ValueError, match="in one of the two networks only"):
        upkern(small.state_dict(), deep)
    large = create_network("mednext", 1, 2, strides=FIVE_STAGES[:2], base_features=4, kernel_size=5)
    with pytest.raises(ValueError, match="enlarges depthwise kernels"):
        upkern(large.state_dict(), small)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (2, 1, 4), (2, 2), (1, 2)], ids=str)
def test_resampling_keeps_to_its_stride_and_up_blocks_are_zero_in_front(stride):
    kernel = [3] * len(stride)
    sizes = [3 * s for s in stride]
    down = MedNeXtDown(4, 6, stride, kernel, expansion=2)(torch.randn(2, 4, *sizes))
    assert down.shape == (2, 6, *[3] * len(stride))
    up = MedNeXtUp(6, 4, stride, kernel, expansion=2)(down)
    assert up.shape == (2, 4, *sizes)
    for axis, s in enumerate(stride, start=2):
        front, rest = up.split([s - 1, up.shape[axis] - s + 1], axis)
        assert not front.any()
        assert rest.any()


def test_the_norm_takes_one_voxel_in_a_batch_of_any_size():
    norm = InstanceGroupNorm(3).double()
    nn.init.normal_(norm.bias)
    for batch in (1, 2):
        y = norm(torch.randn(batch, 3, 1, 1, 1, dtype=torch.float64))
        torch.testing.assert_close(y, norm.bias.view(1, 3, 1, 1, 1).expand_as(y))
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x), F.group_norm(x, 3, norm.weight, norm.bias))


def block_parameters(a: int, b: int, kernel: int, ratio: int) -> int:
    """Architectures reference: C k^n + C + 2C + r C^2 + r C + r C C' + C', with k^n given as ``kernel``."""
    return a * kernel + a + 2 * a + ratio * a * a + ratio * a + ratio * a * b + b


def network_sum(widths, blocks, ratios, kernel: int, channels: int, classes: int, heads) -> int:
    levels = len(widths) - 1
    total = channels * widths[0] + widths[0]
    total += sum(blocks[i] * block_parameters(widths[i], widths[i], kernel, ratios[i]) for i in range(levels + 1))
    total += sum(blocks[i] * block_parameters(widths[i], widths[i], kernel, ratios[i]) for i in range(levels))
    for i, (a, b) in enumerate(pairwise(widths)):
        total += block_parameters(a, b, kernel, ratios[i + 1]) + a * b + b
        total += block_parameters(b, a, kernel, ratios[i]) + a * b + a
    return total + sum(classes * width + classes for width in heads)


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def deeper(values, stages: int):
    return [*values, *[values[-1]] * (stages - len(values))]


@pytest.mark.parametrize(
    ("size", "kernel", "released"),
    [
        ("S", 3, 5_553_840),
        ("B", 3, 10_529_232),
        ("M", 3, 17_551_888),
        ("L", 3, 61_782_192),
        ("S", 5, 5_983_472),
        ("B", 5, 10_958_864),
        ("M", 5, 18_263_760),
        ("L", 5, 62_995_824),
    ],
)
def test_the_released_parameter_counts_but_for_the_two_parts_left_out(size, kernel, released):
    """The released network has a head at the bottleneck and a dummy tensor of one number more."""
    preset = get_spec("mednext").presets[size if kernel == 3 else f"{size}k5"]
    with torch.device("meta"):
        network = create_network("mednext", 1, 3, strides=FIVE_STAGES, geometry="faithful", **preset)
    widths = (32, 64, 128, 256, 512)
    assert network_sum(widths, *RELEASED[size], kernel**3, 1, 3, heads=widths) + 1 == released
    assert count(network) == network_sum(widths, *RELEASED[size], kernel**3, 1, 3, heads=widths[:-1])
    assert count(network) == released - (3 * 512 + 3) - 1


@pytest.mark.parametrize(
    ("size", "kernel", "expected"),
    [
        ("S", 3, 6_368_111),
        ("B", 3, 12_009_743),
        ("M", 3, 19_784_655),
        ("L", 3, 69_025_391),
        ("S", 5, 6_929_455),
        ("B", 5, 12_571_087),
        ("M", 5, 20_716_047),
        ("L", 5, 70_634_159),
    ],
)
def test_native_parameters_are_the_sum_of_the_pieces(size, kernel, expected):
    preset = get_spec("mednext").presets[size if kernel == 3 else f"{size}k5"]
    with torch.device("meta"):
        network = create_network("mednext", 1, 3, strides=SIX_STAGES, **preset)
    widths = (32, 64, 128, 256, 320, 320)
    blocks, ratios = (deeper(values, 6) for values in RELEASED[size])
    assert count(network) == expected == network_sum(widths, blocks, ratios, kernel**3, 1, 3, heads=widths[:-1])


def released_shapes(blocks, ratios, kernel, channels: int, classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released network's state dict, from its description."""
    ones = [1] * len(kernel)
    widths = [width * 2**i for i in range(5)]
    shapes: dict[str, tuple[int, ...]] = {"dummy_tensor": (1,)}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (shape[0],)

    def block(name: str, a: int, b: int, ratio: int) -> None:
        layer(f"{name}.conv1", a, 1, *kernel)
        shapes[f"{name}.norm.weight"] = shapes[f"{name}.norm.bias"] = (a,)
        layer(f"{name}.conv2", ratio * a, a, *ones)
        layer(f"{name}.conv3", b, ratio * a, *ones)

    layer("stem", width, channels, *ones)
    for i in range(5):
        encoder = f"enc_block_{i}" if i < 4 else "bottleneck"
        for j in range(blocks[i]):
            block(f"{encoder}.{j}", widths[i], widths[i], ratios[i])
            if i < 4:
                block(f"dec_block_{i}.{j}", widths[i], widths[i], ratios[i])
        # Transposed convolutions keep (in, out) and their bias has the length of out.
        shapes[f"out_{i}.conv_out.weight"] = (widths[i], classes, *ones)
        shapes[f"out_{i}.conv_out.bias"] = (classes,)
    for i, (a, b) in enumerate(pairwise(widths)):
        block(f"down_{i}", a, b, ratios[i + 1])
        layer(f"down_{i}.res_conv", b, a, *ones)
        block(f"up_{i}", b, a, ratios[i])
        shapes[f"up_{i}.res_conv.weight"], shapes[f"up_{i}.res_conv.bias"] = (b, a, *ones), (a,)
    return shapes


@pytest.mark.parametrize("size", RELEASED)
def test_released_weights_load_key_by_key(size):
    shapes = released_shapes(*RELEASED[size], [3, 3, 3], 1, 3, 32)
    with torch.device("meta"):
        released = {key: torch.empty(shape) for key, shape in shapes.items()}
        preset = get_spec("mednext").presets[size]
        network = create_network("mednext", 1, 3, strides=FIVE_STAGES, geometry="faithful", **preset)
    converted = convert_published(released)
    own = network.state_dict()
    assert {key: tensor.shape for key, tensor in converted.items()} == {key: t.shape for key, t in own.items()}
    left_out = set(released) - {"dummy_tensor", "out_4.conv_out.weight", "out_4.conv_out.bias"}
    assert len(left_out) == len(converted)


def run_released(weights: dict[str, torch.Tensor], blocks, x: torch.Tensor) -> list[torch.Tensor]:
    """The released network's data flow, read off its description, on weights under their own names."""
    functions = {4: (F.conv2d, F.conv_transpose2d), 5: (F.conv3d, F.conv_transpose3d)}
    convolve, transpose = functions[x.dim()]

    def layer(name: str, v: torch.Tensor, function=convolve, **kwargs) -> torch.Tensor:
        return function(v, weights[f"{name}.weight"], weights[f"{name}.bias"], **kwargs)

    def rest(name: str, v: torch.Tensor) -> torch.Tensor:
        v = F.group_norm(v, v.shape[1], weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
        return layer(f"{name}.conv3", F.gelu(layer(f"{name}.conv2", v)))

    def sequence(name: str, v: torch.Tensor, depth: int) -> torch.Tensor:
        for j in range(depth):
            block = f"{name}.{j}"
            v = v + rest(block, layer(f"{block}.conv1", v, padding=1, groups=v.shape[1]))
        return v

    def down(name: str, v: torch.Tensor) -> torch.Tensor:
        main = rest(name, layer(f"{name}.conv1", v, padding=1, stride=2, groups=v.shape[1]))
        return main + layer(f"{name}.res_conv", v, stride=2)

    def up(name: str, v: torch.Tensor) -> torch.Tensor:
        front = [1, 0] * (v.dim() - 2)
        main = rest(name, layer(f"{name}.conv1", v, transpose, padding=1, stride=2, groups=v.shape[1]))
        return F.pad(main, front) + F.pad(layer(f"{name}.res_conv", v, transpose, stride=2), front)

    v, skips = layer("stem", x), []
    for i in range(4):
        skips.append(sequence(f"enc_block_{i}", v, blocks[i]))
        v = down(f"down_{i}", skips[-1])
    v = sequence("bottleneck", v, blocks[4])
    outputs = []
    for i in (3, 2, 1, 0):
        v = sequence(f"dec_block_{i}", skips[i] + up(f"up_{i}", v), blocks[i])
        outputs.append(layer(f"out_{i}.conv_out", v, transpose))
    return outputs[::-1]


@pytest.mark.parametrize("ndim", [2, 3])
def test_released_weights_give_the_released_outputs(ndim):
    blocks, ratios = (1, 2, 1, 1, 2), (2, 3, 4, 4, 4)
    generator = torch.Generator().manual_seed(0)
    shapes = released_shapes(blocks, ratios, [3] * ndim, 2, 3, 4)
    released = {k: torch.randn(shape, generator=generator, dtype=torch.float64) / 3 for k, shape in shapes.items()}
    strides = [[stride] * ndim for stride in (1, 2, 2, 2, 2)]
    network = create_network(
        "mednext",
        2,
        3,
        strides=strides,
        geometry="faithful",
        base_features=4,
        depths=blocks,
        decoder_depths=blocks[:4],
        deep_supervision=True,
    ).double()
    network.load_state_dict(convert_published(released))
    x = torch.randn(1, 2, *[32] * (ndim - 1), 48, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(network(x), run_released(released, blocks, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "key", ["enc_block_0.0.grn_beta", "enc_block_4.0.conv1.weight", "conv_blocks_context.0.weight", "out_0.weight"]
)
def test_a_key_of_another_network_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"{key} is no weight of the released MedNeXt"):
        convert_published({"stem.weight": torch.zeros(1), key: torch.zeros(1)})


def test_kernels_and_strides_follow_the_plan_axis_by_axis():
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    kernels = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    network = create_network(
        "mednext", 1, 2, strides=strides, kernel_sizes=kernels, base_features=4, kernel_size=5, depths=1
    )
    assert network.encoder.stages[0][0].conv1.kernel_size == (1, 5, 5)
    assert network.encoder.stages[1][0].conv1.kernel_size == (5, 5, 5)
    assert (network.encoder.downs[0].conv1.stride, network.encoder.downs[0].conv1.kernel_size) == ((1, 2, 2), (5, 5, 5))
    assert (network.decoder.ups[0].conv1.stride, network.decoder.ups[0].res_conv.stride) == ((1, 2, 2), (1, 2, 2))
    assert network.decoder.stages[0][0].conv1.kernel_size == (1, 5, 5)
    # Nothing looks along depth above the first stage with a kernel of 3 there.
    assert network.encoder.stem.kernel_size == (1, 1, 1)


@pytest.mark.parametrize("ndim", [2, 3])
def test_checkpointing_changes_neither_values_nor_gradients(ndim):
    torch.manual_seed(0)
    build = {"strides": [[1] * ndim, [2] * ndim, [2] * ndim], "base_features": 4, "depths": 1}
    plain = create_network("mednext", 1, 2, **build)
    saving = create_network("mednext", 1, 2, **build, checkpoint_style="outside_block")
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, *[8] * ndim)
    for network in (plain, saving):
        network(x).square().mean().backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad), key
    assert torch.equal(plain(x), saving(x))


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept(style: str | None) -> int:
        network = create_network("mednext", 1, 2, strides=FIVE_STAGES[:2], base_features=8, checkpoint_style=style)
        sizes = []
        own = {parameter.data_ptr() for parameter in network.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(0 if tensor.data_ptr() in own else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(1, 1, 8, 8, 8, requires_grad=True))
        return sum(sizes)

    assert kept("outside_block") < kept(None) / 3


WRONG = {
    "geometry": ({"geometry": "native3d"}, "unknown geometry 'native3d'; known: native, faithful"),
    "checkpoint": ({"checkpoint_style": "inside"}, "unknown checkpoint_style 'inside'; known: None, 'outside_block'"),
    "zero blocks": ({"depths": [2, 0]}, "depths must be a number, or a list of numbers, of at least 1"),
    "no blocks": ({"depths": []}, "depths must be"),
    "expansion": ({"expansion": 0}, "expansion must be"),
    "widths": ({"features_per_stage": [8, 16]}, "features_per_stage must have 6 entries"),
    "kernels": ({"kernel_sizes": [[3, 3, 3]]}, "kernel_sizes must have 6 entries"),
    "even kernel": ({"kernel_size": 4}, "kernel sizes must be odd"),
    "first stride": ({"strides": [[2, 2, 2], [2, 2, 2]]}, r"strides\[0\] must be ones"),
    "a control": ({"ssm_mode": "identity"}, "mednext has no scans, so it takes no ssm_mode"),
    "routes": ({"routes": "raster6", "d_state": 8}, "mednext has no scans, so it takes no d_state, routes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradicting_arguments_are_named(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_network("mednext", 1, 2, **{"strides": SIX_STAGES, **arguments})


def test_a_shallow_plan_takes_the_first_sizes_of_a_published_list():
    with torch.device("meta"):
        network = create_network("mednext", 1, 2, strides=FIVE_STAGES[:2], **get_spec("mednext").presets["L"])
    assert [len(stage) for stage in network.encoder.stages] == [3, 4]
