"""Networks whose blocks are those of a mixer, run over the registries."""

from __future__ import annotations

import json
import math

import pytest
import torch

from medmamba.layers import VSSBlock, parameter_groups
from medmamba.mixers import CORES, placed_scans
from medmamba.mixers.block import MixerBlock
from medmamba.networks import NETWORKS, create_network
from medmamba.presets import MIXERS
from medmamba_pretrain.masking import MaskedEncoder

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
KERNELS = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]
PATCH = (4, 16, 24)
TINY = {"base_features": 8, "decoder_depths": 1, "strides": STRIDES, "kernel_sizes": KERNELS}
WITH_SCANS = [name for name, spec in NETWORKS.items() if spec.has_scans]


def build(mixer, name: str = "vmunet", **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {**TINY, "depths": 1, "first_scan_stage": 1, **kwargs}
    return create_network(name, 1, 2, mixer=mixer, **options)


def image(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 1, *PATCH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_network_of_its_blocks_learns_and_has_a_head_per_level(mixer):
    network = build(mixer, drop_path_rate=0.0, deep_supervision=True).train()
    assert sum(isinstance(module, MixerBlock) for module in network.modules()) == 5
    outputs = network(image())
    assert [tuple(o.shape[2:]) for o in outputs] == [(4, 16, 24), (4, 8, 12), (2, 4, 6)]
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    assert [k for k, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_run_at_another_patch_size_and_load_from_plans(mixer):
    network = build(mixer).eval()
    written = json.loads(json.dumps({"name": mixer, "spacing": [5.0, 0.7, 0.7]}))
    again = build(written).eval()
    again.load_state_dict(network.state_dict())
    assert again(torch.randn(1, 1, 6, 32, 16)).shape == (1, 2, 6, 32, 16)


@pytest.mark.parametrize("mixer", MIXERS)
def test_masked_pretraining_sees_nothing_behind_the_mask(mixer):
    network = build(mixer).eval()
    encoder = MaskedEncoder(network.encoder, network.total_stride)
    visible = torch.zeros(2, 2, 2, 3, dtype=torch.bool)
    visible[0, 0, 0, 1] = visible[0, 1, 1, 2] = visible[1, :, 1] = True
    shown = visible.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3).unsqueeze(1)
    expected = encoder(image(), visible).features
    for noise in (1e6, math.nan):
        features = encoder(torch.where(shown, image(), noise), visible).features
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


@pytest.mark.parametrize("geometry", ["native", "faithful"])
@pytest.mark.parametrize("name", WITH_SCANS)
def test_every_network_takes_a_mixer_in_both_geometries(name, geometry):
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    if geometry == "faithful" and NETWORKS[name].published_strides[1] == 4:
        strides = [[1, 1, 1], [4, 4, 4], [2, 2, 2]]
    network = create_network(name, 1, 2, strides=strides, base_features=8, geometry=geometry, mixer="vim3d")
    blocks = [module for module in network.modules() if isinstance(module, MixerBlock)]
    assert blocks
    assert not any(isinstance(module, VSSBlock) for module in network.modules())
    assert network(torch.randn(1, 1, 16, 16, 8)).shape == (1, 2, 16, 16, 8)


@pytest.mark.parametrize("mixer", MIXERS)
def test_weight_decay_spares_norms_biases_and_what_scans_exempt(mixer):
    network = build(mixer)
    decayed, _ = parameter_groups(network, 0.01)
    names = {id(p): key for key, p in network.named_parameters()}
    spared = ("A_log", ".D", "dt_bias", ".bias", "norm.weight")
    assert [names[id(p)] for p in decayed["params"] if names[id(p)].endswith(spared)] == []


def test_step_sizes_per_route_reach_the_scans_of_a_mixer():
    dt_init = {"patch_size": list(PATCH), "spacing": [5.0, 1.0, 1.0]}
    network = build({"name": "mlfsr3d", "keep_thick": True}, dt_init=dt_init)
    scans = placed_scans(network, 1, PATCH)
    assert scans
    lows = {low for scan in scans for low, _ in scan.core.dt_ranges}
    lengths = {1 / (4 * low) for low in lows}
    assert max(lengths) <= max(PATCH)  # resets at lines: no dependency is longer than an axis
    assert len(lows) > 1


def test_attention_can_stand_at_the_bottleneck_of_any_mixer():
    attention = {"core": "attention", "expand": 1.0, "gate": None, "local": None}
    network = build({"name": "vim3d", "deepest": attention})
    places = {name for name, module in network.named_modules() if isinstance(module, CORES["attention"])}
    assert {name.split(".")[2] for name in places} == {"3"}
    assert all(name.startswith("encoder.stages.3.") for name in places)
    assert network(image()).shape == (2, 2, *PATCH)


def test_a_mixer_with_options_needs_a_name():
    with pytest.raises(ValueError, match="a mixer with options needs a name, got \\['merge'\\]"):
        build({"merge": "mean"})
