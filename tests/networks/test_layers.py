"""Layers: the published 2D numbers, and the laws of resampling in any number of dimensions."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medmamba.layers import (
    ChannelsLast,
    ConvBlock,
    DropPath,
    PatchEmbed,
    PatchExpand,
    PatchMerge,
    conv,
    drop_path_rates,
    exempt_from_decay,
    parameter_groups,
)
from medmamba_kernels.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
# The published float32 code itself is off by 2e-7 to 4e-5 against these float64 numbers; ours runs in float64.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def resample():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "vmunet_resample.npz").items() if k != "meta"}


def published(name: str, ndim: int) -> tuple[nn.Module, str, dict[str, str]]:
    """Our layer, its label in the file, and our parameter names for theirs."""
    lead = (1,) * (ndim - 2)
    return {
        "embed": (PatchEmbed(3, 16, (*lead, 4, 4)), "patch_embed", {"proj": "proj", "norm": "norm"}),
        "merge": (PatchMerge(16, 32, (*lead, 2, 2)), "merge", {"reduction": "reduction", "norm": "norm"}),
        "expand": (PatchExpand(32, 16, (*lead, 2, 2)), "expand", {"expand": "expand", "norm": "norm"}),
        "final": (PatchExpand(16, 4, (*lead, 4, 4)), "final", {"expand": "expand", "norm": "norm"}),
    }[name]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", ["embed", "merge", "expand", "final"])
def test_resampling_equals_the_published_layers_also_on_one_plane(resample, name, ndim):
    layer, label, names = published(name, ndim)
    layer = layer.double()
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            part, _, kind = key.partition(".")
            value = resample[f"w:{label}.{names[part]}.{kind}"].double()
            parameter.copy_(value.view_as(parameter))
    source = "x_img" if name == "embed" else f"x_{name}"
    x = resample[source].double()
    x = x.movedim(1, -1) if name == "embed" else x
    x = (x.unsqueeze(1) if ndim == 3 else x).requires_grad_()
    y = layer(x)
    y_plane = y.squeeze(1) if ndim == 3 else y
    assert_close("y", y_plane, resample[f"y_{name}"], TOLERANCE)
    (y_plane * resample[f"r_{name}"].double()).sum().backward()
    expected = resample[f"g:{source}"]
    expected = expected.movedim(1, -1) if name == "embed" else expected
    assert_close("x gradient", x.grad.squeeze(1) if ndim == 3 else x.grad, expected, TOLERANCE)
    for key, parameter in parameters.items():
        part, _, kind = key.partition(".")
        stored = resample[f"gw:{label}.{names[part]}.{kind}"]
        assert_close(key, parameter.grad.view_as(stored), stored, TOLERANCE)


def test_merging_lists_row_offsets_before_columns_inside_each_depth():
    """Channel tags of a 2x2x2 window come out in the order (d, row, column) = 000, 010, 001, 011, 100, ..."""
    x = torch.arange(8.0).view(1, 2, 2, 2, 1)  # raster tags: d * 4 + row * 2 + column
    gathered = PatchMerge(1, 1, (2, 2, 2))._gather(x)
    assert gathered.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_expanding_puts_channel_blocks_where_their_sub_pixel_is():
    layer = PatchExpand(8, 1, (2, 2, 2))
    layer.norm = nn.Identity()
    nn.init.eye_(layer.expand.weight)
    expanded = layer(torch.arange(8.0).view(1, 1, 1, 1, 8))
    assert expanded.flatten().tolist() == list(range(8))


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (2, 2, 2), (1, 2, 2), (4, 1, 2)], ids=str)
def test_resampling_keeps_to_its_stride(stride):
    sizes = [3 * s for s in stride]
    x = torch.randn(2, *sizes, 4)
    for layer in (PatchEmbed(4, 6, stride), PatchMerge(4, 6, stride)):
        assert layer(x).shape == (2, *[3] * len(stride), 6)
    assert PatchExpand(4, 6, stride)(torch.randn(2, *[3] * len(stride), 4)).shape == (2, *sizes, 6)


def test_channels_last_is_a_view_between_neighbours():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    layer = ChannelsLast(Probe())
    x = torch.randn(1, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(layer(x), x)
    assert seen[0].is_contiguous()
    assert seen[0].data_ptr() == x.data_ptr()


def test_conv_block_is_the_plain_nnunet_block():
    block = ConvBlock(2, 3, (1, 3, 3), stride=(1, 2, 2))
    x = torch.randn(1, 2, 4, 6, 6)
    y = block(x)
    reference = nn.functional.conv3d(x, block.conv.weight, block.conv.bias, (1, 2, 2), (0, 1, 1))
    reference = nn.functional.leaky_relu(nn.functional.instance_norm(reference, eps=1e-5), 0.01)
    torch.testing.assert_close(y, reference)


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel sizes must be odd"):
        conv(1, 1, (2, 3, 3))


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_drop_path_keeps_the_mean_and_drops_whole_samples(rate):
    torch.manual_seed(0)
    layer = DropPath(rate).train()
    y = layer(torch.ones(20000, 2))
    assert torch.equal(y[:, 0], y[:, 1])
    assert y.unique().tolist() == [0.0, pytest.approx(1 / (1 - rate))]
    assert y.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(layer.eval()(torch.ones(3, 2)), torch.ones(3, 2))


def test_drop_path_rates_rise_linearly_over_all_blocks():
    rates = drop_path_rates([1, 2, 1], 0.3)
    assert [len(r) for r in rates] == [1, 2, 1]
    assert functools.reduce(operator.iadd, rates, []) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates([0, 1], 0.3) == [[], [0.0]]
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        DropPath(1.0)


def test_parameter_groups_hold_every_parameter_once():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    module.special = exempt_from_decay(nn.Parameter(torch.ones(2, 2)))
    decayed, exempt = parameter_groups(module, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert exempt["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(module[0].weight)]
    assert {id(p) for p in exempt["params"]} == {id(p) for p in module.parameters()} - {id(module[0].weight)}
