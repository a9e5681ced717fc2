"""What every registered network must do, run over the registry."""

from __future__ import annotations

import json
import pydoc

import pytest
import torch

from medmamba.layers import DropPath, parameter_groups
from medmamba.mixers import CONTROLS, placed_scans
from medmamba.networks import NETWORKS, create_network, get_spec
from medmamba.networks.unet import total_strides

TINY = {"base_features": 8, "depths": 1, "decoder_depths": 1}
#: A network without scans has nothing that a control could replace; it refuses all of these.
SCAN_OPTIONS = {"d_state": 2}
PLANS = {
    "isotropic": ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], (16, 24, 16)),
    "thick slices": ([[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]], (4, 16, 24)),
    "six stages, depth 4 below": ([[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 3, [1, 2, 2]], (32, 32, 32)),
    "odd bottom": ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], (40, 56, 40)),
    "bottom of one voxel": ([[1, 1, 1], [2, 2, 2], [2, 2, 2]], (4, 4, 4)),
    "image": ([[1, 1], [2, 2], [2, 2], [2, 2]], (24, 16)),
}
FAITHFUL_PLANS = {
    "isotropic": ([[1, 1, 1], [4, 4, 4], [2, 2, 2], [2, 2, 2]], (16, 32, 16)),
    "thick slices": ([[1, 1, 1], [1, 4, 4], [2, 2, 2], [1, 2, 2]], (4, 16, 32)),
    "image": ([[1, 1], [4, 4], [2, 2], [2, 2]], (32, 16)),
}
CASES = [(name, "native", plan) for name in NETWORKS for plan in PLANS]
CASES += [(name, "faithful", plan) for name in NETWORKS for plan in FAITHFUL_PLANS]


MODES = [(*case, mode) for case in CASES for mode in (["scan", *CONTROLS] if NETWORKS[case[0]].has_scans else [None])]


def tiny(name: str, **kwargs):
    return {**TINY, **(SCAN_OPTIONS if NETWORKS[name].has_scans else {}), **kwargs}


def build(name: str, geometry: str, plan: str, **kwargs):
    strides, patch = (PLANS if geometry == "native" else FAITHFUL_PLANS)[plan]
    network = create_network(name, 2, 3, strides=strides, geometry=geometry, **tiny(name, **kwargs))
    return network, torch.randn(1, 2, *patch), strides, patch


def has_no_effect(key: str, plan: str, stages: int) -> bool:
    """Parameters without effect by construction.

    Biases in front of a norm over voxels; at a bottom of one voxel also the decay of the scan and what leads into
    such a norm, which returns its bias there.
    """
    if key.endswith(("conv.bias", "conv1.bias")):
        return True
    deepest = (f"encoder.downs.{stages - 2}.", f"encoder.stages.{stages - 1}.", f"decoder.ups.{stages - 2}.")
    silenced = key.startswith(deepest) and key.endswith(("conv1.weight", "norm.weight"))
    return plan == "bottom of one voxel" and (key.endswith("A_log") or silenced)


@pytest.mark.parametrize(("name", "geometry", "plan", "ssm_mode"), MODES)
def test_every_parameter_gets_a_gradient_and_outputs_fit_the_plan(name, geometry, plan, ssm_mode):
    torch.manual_seed(0)
    mode = {} if ssm_mode is None else {"ssm_mode": ssm_mode}
    network, x, strides, patch = build(name, geometry, plan, deep_supervision=True, **mode)
    for module in network.modules():
        if isinstance(module, DropPath):  # a branch that is dropped for all samples of a batch has none, by chance
            module.rate = 0.0
    outputs = network.train()(torch.cat([x, x.flip(-1)]))
    totals = total_strides(strides)[:-1]
    expected = [(2, 3, *[size // s for size, s in zip(patch, total, strict=True)]) for total in totals]
    assert [tuple(o.shape) for o in outputs] == expected
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    without = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    zero = [key for key, p in network.named_parameters() if not p.grad.any()]
    assert [key for key in zero if not has_no_effect(key, plan, len(strides))] == []
    if plan == "isotropic":
        network.zero_grad()
        network.decoder.deep_supervision = False
        (network(torch.cat([x, x.flip(-1)])) * torch.randn(2, 3, *patch)).sum().backward()
        without = {key for key, p in network.named_parameters() if p.grad is None}
        heads = {key for key, _ in network.named_parameters() if ".seg_layers." in key}
        assert without == {key for key in heads if not key.startswith("decoder.seg_layers.0.")}


@pytest.mark.parametrize("geometry", ["native", "faithful"])
@pytest.mark.parametrize("name", NETWORKS)
def test_deep_supervision_changes_only_what_is_returned(name, geometry):
    network, x, *_ = build(name, geometry, "isotropic", deep_supervision=False)
    network.eval()
    alone = network(x)
    network.decoder.deep_supervision = True
    outputs = network(x)
    assert torch.equal(outputs[0], alone)
    other, *_ = build(name, geometry, "isotropic", deep_supervision=True)
    assert list(other.state_dict()) == list(network.state_dict())
    other.load_state_dict(network.state_dict())
    assert any(".seg_layers." in key for key in network.state_dict())


@pytest.mark.parametrize("geometry", ["native", "faithful"])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_set_of_weights_runs_at_any_patch_size(name, geometry):
    network, x, *_ = build(name, geometry, "isotropic")
    network.eval()
    for factor in (1, 2):
        volume = x.repeat(1, 1, factor, 1, 1)
        assert network(volume).shape == (1, 3, *volume.shape[2:])


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_of_a_batch_do_not_see_each_other(name):
    network, x, *_ = build(name, "native", "isotropic")
    network.eval()
    other = torch.randn_like(x)
    torch.testing.assert_close(network(torch.cat([x, other]))[:1], network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_patch_that_does_not_fit_is_refused_with_one_that_does(name):
    network, *_ = build(name, "native", "isotropic")
    with pytest.raises(ValueError, match=r"\(30, 16, 16\) is not divisible .* \(8, 8, 8\); pad it to \(32, 16, 16\)"):
        network(torch.zeros(1, 2, 30, 16, 16))
    with pytest.raises(ValueError, match="2 spatial axes"):
        network(torch.zeros(1, 2, 16, 16))


@pytest.mark.parametrize("name", NETWORKS)
def test_nnunet_can_locate_and_build_it_from_json(name):
    spec = get_spec(name)
    arch_kwargs = json.loads(json.dumps({"strides": PLANS["isotropic"][0], **spec.defaults, **tiny(name)}))
    build_network = pydoc.locate(spec.build)
    network = build_network(input_channels=1, num_classes=2, **arch_kwargs, deep_supervision=True)
    assert len(network(torch.zeros(1, 1, 8, 8, 8))) == 3
    for preset in spec.presets.values():
        assert json.loads(json.dumps(preset)) == dict(preset)
        create_network(name, 1, 2, strides=PLANS["isotropic"][0], **preset)


@pytest.mark.parametrize("name", NETWORKS)
def test_weight_decay_spares_what_it_would_bend(name):
    network, *_ = build(name, "native", "isotropic")
    decayed, exempt = parameter_groups(network, 0.01)
    names = {id(p): key for key, p in network.named_parameters()}
    spared = {names[id(p)] for p in exempt["params"]}
    for key in names.values():
        must = key.endswith(("A_log", ".D", "dt_bias", ".bias")) or "norm" in key
        assert (key in spared) == must, key
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


@pytest.mark.parametrize("name", NETWORKS)
def test_only_networks_with_scans_take_a_control(name):
    strides, patch = PLANS["isotropic"]
    network = create_network(name, 1, 2, strides=strides, **tiny(name))
    assert bool(placed_scans(network, 1, patch)) == NETWORKS[name].has_scans
    if not NETWORKS[name].has_scans:
        with pytest.raises(ValueError, match=f"{name} has no scans, so it takes no ssm_mode"):
            create_network(name, 1, 2, strides=strides, ssm_mode="identity")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_preset_builds_in_two_and_three_dimensions(name):
    for preset in NETWORKS[name].presets.values():
        for plan in ("thick slices", "image"):
            with torch.device("meta"):
                create_network(name, 1, 2, strides=PLANS[plan][0], **preset)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_autocast_stays_finite(name):
    network, x, *_ = build(name, "native", "isotropic")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(x * 100)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_says_what_it_changed(name):
    spec = NETWORKS[name]
    assert spec.name == name
    assert spec.paper.link.startswith("https://")
    assert spec.paper.year >= 2015
    assert spec.departures
    assert all(d == d.strip() and not d.endswith(".") for d in spec.departures)


def test_an_unknown_network_names_the_known_ones():
    with pytest.raises(KeyError, match=f"no network 'vmnet'; known: {', '.join(sorted(NETWORKS))}"):
        get_spec("vmnet")
