"""Published names: counts and shapes of the real files, spellings, prefixes."""

from __future__ import annotations

import pytest
import torch

from medmamba.networks import create_network
from medmamba.weights import WeightsError
from medmamba.weights.published import NAMINGS, recognise

STRIDES = [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]
SOURCES = {
    "vmunet": "VM-UNet",
    "mhsvm": "MHS-VM",
    "msvmunet": "MSVM-UNet",
    "vmamba": "VMamba v0 classifier",
    "vmamba2": "VMamba v2 classifier",
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vmunet", 27_427_561),
        ("mhsvm", 17_257_129),
        ("mhsvm with three heads", 17_386_153),
        ("msvmunet", 35_925_513),
    ],
)
def test_the_networks_of_these_tests_have_the_published_size(published, name, parameters):
    assert sum(p.numel() for p in published.full(name).parameters()) == parameters


def test_names_agree_with_what_users_of_the_real_file_saw(published):
    """VM-UNet issue #23: "Total model_dict: 222, Total pretrained_dict: 446, update: 117" for VMamba-S."""
    theirs, ours = published.full("vmamba").state_dict(), published.full("vmunet").vmunet.state_dict()
    assert (len(ours), len(theirs), len(theirs.keys() & ours.keys())) == (222, 446, 117)


def test_shapes_agree_with_what_users_of_the_real_file_saw(published):
    """VMamba issue #238, of vssm1_tiny_0230s_ckpt_epoch_264.pth."""
    state = published.full("vmamba2").state_dict()
    shapes = {key: tuple(state[f"layers.0.blocks.0.op.{key}"].shape) for key in SHAPES_OF_ISSUE_238}
    assert shapes == SHAPES_OF_ISSUE_238
    assert {"classifier.head.weight", "layers.0.downsample.1.weight", "patch_embed.7.bias"} <= set(state)


SHAPES_OF_ISSUE_238 = {
    "x_proj_weight": (4, 8, 96),
    "A_logs": (384, 1),
    "Ds": (384,),
    "dt_projs_weight": (4, 96, 6),
    "dt_projs_bias": (4, 96),
    "out_norm.weight": (96,),
}


@pytest.mark.parametrize(("name", "source"), SOURCES.items())
def test_every_tensor_is_known_by_its_name(published, name, source):
    found = recognise(published.build(name).state_dict())
    assert found.naming.name == source
    assert not found.unknown
    count = len(found.tensors) + len(found.surplus)
    assert count == len(published.build(name).state_dict())


@pytest.mark.parametrize("name", ["vmunet", "mhsvm", "msvmunet"])
def test_places_of_the_full_size_are_the_parameters_of_ours(published, name):
    """One to one, on names and shapes, for the sizes of the papers."""
    from medmamba.weights.layout import layout_of

    classes = 9 if name == "msvmunet" else 1
    options = {"expand_norm": "batch"} if name == "msvmunet" else {}
    with torch.device("meta"):
        ours = create_network(name, 3, classes, strides=STRIDES, geometry="faithful", auxiliary_heads=False, **options)
    layout, state, numbers = layout_of(ours), ours.state_dict(), {}
    naming = next(naming for naming in NAMINGS if naming.name == SOURCES[name])
    for key, value in published.full(name).state_dict().items():
        place = naming.place_of(key.removeprefix("vmunet."), 3)
        numbers[layout.key(place)] = value.numel()
    assert numbers == {key: value.numel() for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module.model.", "_model."])
def test_prefixes_that_all_names_share_are_taken_off(published, prefix):
    weights = published.build("vmamba").state_dict()
    found = recognise({prefix + key: value for key, value in weights.items()})
    assert {name for name, _ in found.tensors.values()} | set(found.surplus) == set(weights)


def test_the_counters_of_a_profiler_are_no_weights(published):
    weights = dict(published.build("vmunet").state_dict())
    weights |= {"total_ops": torch.zeros(1), "vmunet.layers.0.total_params": torch.zeros(1)}
    found = recognise(weights)
    assert found.naming.name == "VM-UNet"
    assert set(found.surplus) == {"total_ops", "layers.0.total_params"}
    assert not found.unknown


def test_two_names_of_one_tensor_must_agree(published):
    weights = dict(published.build("mhsvm").state_dict())
    key = "vmunet.layers.0.blocks.0.self_attention.mhs.x_ssproj_W"
    assert torch.equal(weights[key], weights[key.replace("_W", ".weight")])
    weights[key] = weights[key] + 1
    with pytest.raises(WeightsError, match="two names of one tensor of MHS-VM and differ"):
        recognise(weights)


@pytest.mark.parametrize(
    "names",
    [
        ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight"],
        ["encoder.stages.0.body.0.norm.weight", "decoder.seg_layers.0.weight"],
        ["layers.0.blocks.0.attn.qkv.weight", "patch_embed.proj.weight"],
        [],
    ],
    ids=["resnet", "ours", "swin", "none"],
)
def test_other_names_are_refused_with_the_first_of_them(names):
    with pytest.raises(WeightsError) as caught:
        recognise({name: torch.zeros(1) for name in names})
    assert (", ".join(names) or "(none)") in str(caught.value)
    assert all(naming.name in str(caught.value) for naming in NAMINGS)
