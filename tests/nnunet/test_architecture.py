"""From nnU-Net's architecture block to ours."""

from __future__ import annotations

import json
from copy import deepcopy
from math import prod
from pydoc import locate

import pytest
import torch

from medmamba.networks import NETWORKS
from medmamba.nnunet.architecture import ArchitectureError, architecture_block, check_patch, network_of

STOCK = [
    ("isotropic", "2d"),
    ("isotropic", "3d_fullres"),
    ("anisotropic", "3d_fullres"),
    ("cascade", "3d_lowres"),
    ("images", "2d"),
]


@pytest.fixture
def stock_block(load_plans):
    return lambda plans, configuration: load_plans(plans)["configurations"][configuration]["architecture"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("plans", "configuration"), STOCK, ids=str)
@pytest.mark.parametrize("geometry", ["native", "faithful"])
def test_every_network_follows_every_stock_plan(network, plans, configuration, geometry, stock_block):
    stock = stock_block(plans, configuration)
    before = deepcopy(stock)
    block = architecture_block(network, stock, {"geometry": geometry})
    assert stock == before
    assert json.loads(json.dumps(block)) == block
    strides = block["arch_kwargs"]["strides"]
    assert strides[0] == [1] * len(strides[0])
    for axis in range(len(strides[0])):
        ours, planned = (prod(s[axis] for s in all_) for all_ in (strides, before["arch_kwargs"]["strides"]))
        assert planned % ours == 0, "the patch of the plan must fit"
        assert ours == planned or len(strides) == 5, "only the published number of stages may cut the plan short"
    assert network_of(block) == network
    with torch.device("meta"):
        built = locate(block["network_class_name"])(1, 3, **block["arch_kwargs"], deep_supervision=True)
    assert len(built.decoder.seg_layers) == len(strides) - 1


def test_native_takes_kernels_and_widths_of_the_plan(stock_block):
    stock = stock_block("anisotropic", "3d_fullres")
    arguments = architecture_block("vmunet", stock)["arch_kwargs"]
    for name in ("strides", "kernel_sizes", "features_per_stage"):
        assert arguments[name] == stock["arch_kwargs"][name]


def test_widths_that_are_asked_for_win_over_the_plan(stock_block):
    arguments = architecture_block("vmunet", stock_block("isotropic", "3d_fullres"), {"base_features": 8})[
        "arch_kwargs"
    ]
    assert arguments["base_features"] == 8
    assert "features_per_stage" not in arguments


def test_faithful_opens_with_the_published_patch_embedding(stock_block):
    stock = stock_block("cascade", "3d_fullres")
    arguments = architecture_block("vmunet", stock, {"geometry": "faithful"})["arch_kwargs"]
    assert arguments["strides"][:2] == [[1, 1, 1], [4, 4, 4]]
    assert len(arguments["kernel_sizes"]) == len(arguments["strides"]) == len(stock["arch_kwargs"]["strides"]) - 1


@pytest.mark.parametrize("network", ["mednext", "mednextmamba"])
def test_faithful_keeps_five_stages_of_the_plan_where_no_patches_were_published(network, stock_block):
    stock = stock_block("cascade", "3d_fullres")
    arguments = architecture_block(network, stock, {"geometry": "faithful"})["arch_kwargs"]
    assert arguments["strides"] == stock["arch_kwargs"]["strides"][:5]
    assert arguments["kernel_sizes"] == stock["arch_kwargs"]["kernel_sizes"][:5]
    assert "features_per_stage" not in arguments


def test_a_foreign_network_is_nobodys(stock_block):
    assert network_of(stock_block("isotropic", "2d")) is None


def test_a_network_of_another_version_is_named():
    with pytest.raises(ArchitectureError, match=r"medmamba\.networks\.old\.net, which this version"):
        network_of({"network_class_name": "medmamba.networks.old.net"})


def test_a_block_without_strides_is_refused():
    with pytest.raises(ArchitectureError, match="Primus without strides"):
        architecture_block("vmunet", {"network_class_name": "some.Primus", "arch_kwargs": {}})


def test_too_few_stages_for_the_faithful_geometry_are_refused():
    stock = {"network_class_name": "some.UNet", "arch_kwargs": {"strides": [[1, 1], [2, 2]]}}
    with pytest.raises(ArchitectureError, match="use --geometry native"):
        architecture_block("vmunet", stock, {"geometry": "faithful"})


def test_a_patch_that_fits_passes():
    check_patch([4, 16, 24], [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]])


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ([40, 50, 40], "axis 1 must be a multiple of 8, not 50; use 48 or 56"),
        ([6, 16, 16], "axis 0 must be a multiple of 4, not 6; use 4 or 8"),
        ([0, 16, 16], "axis 0 must be a multiple of 4, not 0; use 4"),
        ([16, 16], "has 2 axes, the strides have 3"),
    ],
    ids=str,
)
def test_a_patch_that_does_not_fit_is_answered_with_sizes_that_do(patch, message):
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    with pytest.raises(ArchitectureError, match=message):
        check_patch(patch, strides)
