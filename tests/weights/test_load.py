"""Published weights in our networks: the published function in 2D, kept in 3D, and no load in part without a word."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.layers import SS2D, ConvDown, LargeKernelExpand, PatchEmbed, PatchExpand, PatchMerge
from medmamba.mixers import ScanCore
from medmamba.networks import create_network
from medmamba.weights import WeightsError, load_published
from medmamba.weights.inflate import NoCounterpartError, channels_of_image, route_sources, rules_of
from medmamba_kernels import ROUTE_SETS, resolve_routes

STRIDES = [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]
FLAT = [[1, *stride] for stride in STRIDES]
# Of logits of order 1; what is left is rounding.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
PUBLISHED_HEADS = {"mhsvm": ["mhs_c4", "mhs_x4", "mhs_s4", "mhs_z4"]}
PUBLISHED_HEADS["mhsvm with three heads"] = PUBLISHED_HEADS["mhsvm"][:3]
NAMES = ["vmunet", "msvmunet", "mhsvm", "mhsvm with three heads"]


@pytest.fixture(scope="module")
def ours(published):
    """A network of ours with the shape of the small published one, in float64 and eval mode."""

    def build(name: str, *, channels: int = 3, classes: int = 2, strides=STRIDES, **arguments):
        torch.manual_seed(1)
        arguments = {**published.ours[name], **arguments}
        network = create_network(name.split()[0], channels, classes, strides=strides, **arguments)
        return network.double().eval()

    return build


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_segmented_as_by_the_published_network(published, ours, name):
    network = ours(name)
    report = load_published(network, published.build(name).state_dict())
    assert (report.adapted, report.missing) == ({}, {})
    assert set(report.loaded) == set(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(published.image), published.segmented(name), **EXACT)


ROUTES = {
    "vmunet": [None, "raster12", ["dhw", "dwh", "dhw:reverse", "dwh:reverse"]],
    "msvmunet": [None, "raster12", ["dwh:reverse", "dhw", "dhw:reverse", "dwh"]],
    **{name: [heads] for name, heads in PUBLISHED_HEADS.items()},
}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("name", "routes"), [(name, each) for name in NAMES for each in ROUTES[name]], ids=str)
def test_a_volume_of_depth_one_is_segmented_as_an_image(published, ours, name, routes, kernel):
    """For six and twelve routes too: those that fall together on a plane share the published one's part of the sum."""
    network = ours(name, strides=FLAT, kernel_sizes=[[kernel, 3, 3]] * 5, routes=routes)
    report = load_published(network, published.build(name).state_dict())
    assert not report.missing
    with torch.no_grad():
        flat = network(published.image.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(flat, published.segmented(name), **EXACT)


@pytest.mark.parametrize("depth", [[1, 4, 2, 2, 2], [1, 1, 2, 2, 1], [1, 3, 1, 1, 2]], ids=str)
@pytest.mark.parametrize("name", ["vmunet", "msvmunet"])
def test_a_volume_that_does_not_change_along_depth_is_segmented_slice_by_slice(published, ours, name, depth):
    """Strides along depth: means of slices where patches are taken, repeated where they are given back.

    The routes stay in their plane; MHS-VM's turn round from plane to plane, so that no two planes are read alike.
    """
    routes = [f"{route}:reset=plane" for route in ROUTE_SETS["raster4"]]
    network = ours(name, strides=[[d, *s] for d, s in zip(depth, STRIDES, strict=True)], routes=routes)
    load_published(network, published.build(name).state_dict())
    with torch.no_grad():
        volume = network(published.image.unsqueeze(2).expand(-1, -1, math.prod(depth), -1, -1)[:1])
    torch.testing.assert_close(volume, published.segmented(name)[:1].unsqueeze(2).expand_as(volume), **EXACT)


@pytest.mark.parametrize("name", ["vmunet", "msvmunet"])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_equal_channels_are_a_grey_image(published, ours, name, channels):
    """The published networks repeat a grey image to three channels; any number of equal ones gives the same."""
    reference, network = published.build(name), ours(name, channels=channels)
    load_published(network, reference.state_dict())
    grey = published.image[:1, :1]
    with torch.no_grad():
        torch.testing.assert_close(network(grey.expand(-1, channels, -1, -1)), reference(grey), **EXACT)


def test_gradients_reach_every_loaded_parameter(published, ours):
    network = ours("vmunet", channels=1, strides=FLAT).train()
    load_published(network, published.build("vmunet").state_dict())
    network(published.image[:, :1].unsqueeze(2)).square().mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in network.parameters())


def test_a_checkpoint_in_half_precision_is_computed_with_in_the_precision_of_the_network(published, ours):
    network = ours("vmunet", strides=FLAT, routes="raster12")
    weights = {key: value.half() for key, value in published.build("vmunet").state_dict().items()}
    load_published(network, weights)
    rows = weights["vmunet.layers.0.blocks.0.self_attention.Ds"][:16].double()
    torch.testing.assert_close(network.encoder.stages[0].body[0].ss2d.core.D[0], rows / 3, rtol=1e-12, atol=0)


# The parts, with open-ended shapes


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(ROUTE_SETS["raster12"]), max_size=8), st.permutations(ROUTE_SETS["raster4"]))
def test_any_rasters_that_cover_a_plane_give_the_published_block(further, covering):
    torch.manual_seed(0)
    plane, volume = (
        SS2D(4, core=partial(ScanCore, d_state=2, routes=routes), kernel_size=[1, 3, 3], expand=2.0).double()
        for routes in ("raster4", [*covering, *further])
    )
    state = plane.state_dict()
    for name in ("core.A_log", "core.D"):  # as published: routes and channels in one axis
        state[name] = state[name].flatten(0, 1)
    for key, rule in rules_of(volume).items():
        for step in rule:
            state[key] = step.apply(state[key])
    volume.load_state_dict(state)
    x = torch.randn(1, 1, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(volume(x), plane(x), **EXACT)


@given(st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_first_convolution_adds_up_to_the_same_for_any_number_of_channels(count, published):
    value = torch.randn(2, published, 3, 3, dtype=torch.float64)
    for step in channels_of_image(count, published):
        value_of_ours = step.apply(value)
        assert value_of_ours.shape == (2, count, 3, 3)
        torch.testing.assert_close(value_of_ours.sum(1), value.sum(1))
    assert bool(channels_of_image(count, published)) == (count != published)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "layer",
    [
        partial(PatchEmbed, 6, 4),
        partial(PatchMerge, 6, 4),
        partial(PatchExpand, 6, 4),
        partial(LargeKernelExpand, 6, 4, kernel_size=[3, 3, 3], norm="batch"),
        partial(ConvDown, 6, 4, kernel_size=[3, 3, 3]),
    ],
    ids=["embed", "merge", "expand", "large kernel", "convolution"],
)
def test_a_resampling_layer_does_in_every_slice_what_it_did_in_the_plane(layer, depth):
    torch.manual_seed(0)
    kernel = {"kernel_size": [3, 3]} if "kernel_size" in layer.keywords else {}
    flat, deep = layer(stride=[2, 2], **kernel).double().eval(), layer(stride=[depth, 2, 2]).double().eval()
    for name, buffer in flat.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5) if "running" in name else None
    state = flat.state_dict()
    for key, rule in rules_of(deep).items():
        for step in rule:
            state[key] = step.apply(state[key])
    deep.load_state_dict({key: state[key].reshape(value.shape) for key, value in deep.state_dict().items()})
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    y, expected = deep(x.unsqueeze(1).expand(-1, 2 * depth, -1, -1, -1)), flat(x)
    torch.testing.assert_close(y, expected.unsqueeze(1).expand_as(y), **EXACT)


@pytest.mark.parametrize(
    ("routes", "sources"),
    [
        ("raster4", [0, 1, 2, 3]),
        ("raster6", [0, 1, 0, 2, 3, 2]),
        ("raster12", [0, 1, 0, 0, 1, 1, 2, 3, 2, 2, 3, 3]),
        (["whd:reverse", "dhw:reset=line"], [3, 0]),
        ("snake6", [0, 1, 0, 2, 3, 2]),
    ],
    ids=str,
)
def test_a_route_takes_the_weights_of_its_way_through_a_plane(routes, sources):
    assert route_sources(resolve_routes(routes), resolve_routes("raster4")) == sources


@pytest.mark.parametrize(
    ("routes", "published"), [("mhs_s6", "mhs_s4"), (["dhw:shuffle"], "raster4"), (["dhw:flip=w"], "raster4")], ids=str
)
def test_a_route_without_a_relative_in_the_plane_is_refused(routes, published):
    with pytest.raises(NoCounterpartError, match="is none of the published"):
        route_sources(resolve_routes(routes), resolve_routes(published))


# Encoders


@pytest.mark.parametrize("spelling", ["first release", "later"])
def test_vmamba_fills_the_encoder_of_vmunet(published, ours, spelling):
    reference, network = published.build("vmamba"), ours("vmunet")
    weights = reference.state_dict()
    if spelling == "later":
        renamed = {"ln_1": "norm", "self_attention": "op", "patch_embed.proj": "patch_embed.0"}
        renamed["patch_embed.norm"] = "patch_embed.2"
        for old, new in renamed.items():
            weights = {key.replace(old, new): value for key, value in weights.items()}
    decoder = {key: value.clone() for key, value in network.decoder.state_dict().items()}
    report = load_published(network, weights)
    assert {key for key in report.missing if key.startswith("encoder.")} == set()
    assert set(report.missing) == {f"decoder.{key}" for key in decoder}
    assert all(torch.equal(value, decoder[key]) for key, value in network.decoder.state_dict().items())
    # Blocks that a shallower network does not have are named, and so is the classifier.
    surplus = [key for key in weights if key.startswith(("layers.2.blocks.1", "layers.2.blocks.2", "norm", "head"))]
    assert sorted(report.unused) == sorted(surplus)
    reference.layers[2].blocks, kept = reference.layers[2].blocks[:1], reference.layers[2].blocks
    try:
        with torch.no_grad():
            theirs, features = reference.features(published.image), network.encoder(published.image)
    finally:
        reference.layers[2].blocks = kept
    for feature, expected in zip(features, [f.movedim(-1, 1) for f in theirs], strict=True):
        torch.testing.assert_close(feature, expected, **EXACT)


def test_a_plan_with_fewer_stages_takes_the_first_of_an_encoder(published, ours):
    arguments = {"strides": STRIDES[:3], "depths": [1, 2], "decoder_depths": [1, 1]}
    network = ours("vmunet", **arguments)
    report = load_published(network, published.build("vmamba").state_dict(), mirror_decoder=True)
    assert not [key for key in report.missing if key.startswith("encoder.")]
    left = {key.split(".")[1] for key in report.unused if key.startswith("layers.")}
    assert left == {"1", "2", "3"}  # of stage 1 the merging alone
    assert report.unused["layers.1.downsample.norm.weight"] == "the network has no such downsampling"
    with torch.no_grad():
        features = network.encoder(published.image)
        expected = published.build("vmamba").features(published.image)[:2]
    for feature, one in zip(features, expected, strict=False):
        torch.testing.assert_close(feature, one.movedim(-1, 1), **EXACT)


def test_vmamba2_fills_the_encoder_of_msvmunet_as_the_published_encoder_does(published, ours):
    weights = published.build("vmamba2").state_dict()
    network = ours("msvmunet")
    report = load_published(network, weights)
    assert report.source == "VMamba v2 classifier (widths 8, 16, 32, 64; blocks 1, 1, 3, 1)"
    assert not [key for key in report.missing if key.startswith("encoder.")]
    # What MSVM-UNet's own code makes of that file: the same tensors under other names.
    reference = published.build("msvmunet")
    theirs = {key.removeprefix("encoder."): value for key, value in reference.state_dict().items() if "encoder." in key}
    other = ours("msvmunet")
    assert load_published(other, theirs).source.startswith("MSVM-UNet's encoder (")
    with torch.no_grad():
        expected = reference.encoder(published.image)
        features = other.encoder(published.image)[1:]
    for feature, one in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, one, **EXACT)
    renamed = {"layer0.": "patch_embed.", "layer1.0": "patch_embed.5", "layer1.2": "patch_embed.7"}
    for old, new in renamed.items():
        theirs = {key.replace(old, new): value for key, value in theirs.items()}
    theirs = {
        f"layers.{key.split('.')[1]}.downsample.{key.split('.', 2)[2]}" if key.startswith("downsamples") else key: value
        for key, value in theirs.items()
    }
    load_published(network, theirs)
    assert all(torch.equal(a, b) for a, b in zip(network.encoder.parameters(), other.encoder.parameters(), strict=True))


def test_a_mirrored_decoder_starts_like_the_encoder_of_its_level(published, ours):
    network = ours("vmunet")
    report = load_published(network, published.build("vmamba").state_dict(), mirror_decoder=True)
    blocks = 0
    for stage, mirrored in zip(network.encoder.stages, network.decoder.stages, strict=True):
        for block, twin in zip(stage.body, mirrored.body, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(block.parameters(), twin.parameters(), strict=True))
            blocks += 1
    assert blocks == 6
    assert not any(key.startswith("decoder.stages") for key in report.missing)
    assert {key.split(".")[1] for key in report.missing} == {"ups", "final", "seg_layers"}


@pytest.mark.parametrize("name", ["vmunet", "msvmunet"])
def test_a_mirrored_decoder_is_vmunets_own(published, ours, name):
    source = {"vmunet": "vmunet", "msvmunet": "vmamba2"}[name]
    with pytest.raises(WeightsError, match=r"a mirrored decoder is for the encoder of VM-UNet .* leave"):
        load_published(ours(name), published.build(source).state_dict(), mirror_decoder=True)


# Nothing in silence


def snapshot(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"base_features": 16},
            r"VM-UNet \(widths 8, 16, 32, 64; blocks 1, 2, 1, 2\) would be loaded in part only: encoder\.embed\.\S+ "
            r"\(shape \(16, 3, 4, 4\) here, \(8, 3, 4, 4\) in the checkpoint\).*geometry='faithful'.*allow_partial",
        ),
        ({"depths": 3}, r"encoder\.stages\.0\.body\.1\.norm\.weight and \d+ more \(not in the checkpoint\)"),
        ({"depths": 1}, r"layers\.1\.blocks\.1\.\S+ and 25 more \(a block or parameter that this network does not"),
        ({"ssm_mode": "identity"}, r"x_proj_weight and \d+ more \(a block or parameter"),
        ({"routes": ["dhw:shuffle", "dhw"]}, "route dhw:shuffle is none of the published dhw, dwh, dhw:reverse"),
        (
            {"geometry": "native", "first_scan_stage": 1},
            r"patch_embed\.\S+ and 3 more \(the network has no such embedding",
        ),
    ],
    ids=["widths", "more blocks", "fewer blocks", "control", "routes", "native"],
)
def test_a_whole_network_is_loaded_whole_or_not_at_all(published, ours, arguments, message):
    if "geometry" in arguments:
        arguments = {**arguments, "auxiliary_heads": True, "depths": 1, "decoder_depths": 1}
    network = ours("vmunet", **arguments)
    before = snapshot(network)
    with pytest.raises(WeightsError, match=message):
        load_published(network, published.build("vmunet").state_dict())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_an_encoder_must_fill_the_encoder(published, ours):
    weights = published.build("vmamba").state_dict()
    del weights["layers.1.blocks.0.self_attention.Ds"]
    with pytest.raises(WeightsError, match=r"in part only: encoder\.stages\.1\.body\.0\.ss2d\.core\.D \(not in the ch"):
        load_published(ours("vmunet"), weights)


def test_a_name_that_is_not_known_is_refused(published, ours):
    weights = {**published.build("vmunet").state_dict(), "vmunet.something.new": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"in part only: something\.new \(no name of VM-UNet\)"):
        load_published(ours("vmunet"), weights)


def test_a_part_that_is_allowed_is_reported_tensor_by_tensor(published, ours):
    network = ours("vmunet", depths=[1, 3, 1, 2])
    before = snapshot(network)
    weights = published.build("vmunet").state_dict()
    weights["vmunet.something.new"] = torch.zeros(2)
    report = load_published(network, weights, allow_partial=True)
    assert set(report.missing) == {key for key in before if key.startswith("encoder.stages.1.body.2.")} != set()
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in report.missing)
    assert report.unused == {"something.new": "no name of VM-UNet"}
    assert set(report.loaded) | set(report.missing) == set(before)
    text = str(report)
    assert "missing    13 tensors of the network, which keep their initial values" in text
    assert "1  no name of VM-UNet: something.new" in text


def test_the_native_geometry_takes_what_fits(published, ours):
    """Stage 2 of the plan is at stride 4, like the first published stage; widths are chosen to agree."""
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    arguments = {"geometry": "native", "features_per_stage": [4, 4, 8, 16, 32, 99], "base_features": None}
    arguments |= {"depths": [1, 1, 1, 2, 1, 2], "decoder_depths": 1, "auxiliary_heads": True}
    network = ours("vmunet", strides=strides, **arguments)
    report = load_published(network, published.build("vmunet").state_dict(), allow_partial=True)
    filled = [*report.loaded, *report.adapted]
    stages = {key.rsplit(".body.", 1)[0] for key in filled if ".stages." in key}
    assert stages == {f"{part}.stages.{i}" for part in ("encoder", "decoder") for i in (2, 3, 4)}
    between = {key for key in filled if key.endswith(("reduction.weight", "expand.weight"))}
    assert between == {f"encoder.downs.{i}.body.0.reduction.weight" for i in (2, 3)} | {
        f"decoder.ups.{i}.body.0.expand.weight" for i in (2, 3)
    }
    assert report.missing["encoder.stages.5.body.0.norm.weight"] == "shape (99,) here, (64,) in the checkpoint"
    assert torch.isfinite(network(torch.randn(1, 3, 32, 32, 32, dtype=torch.float64))).all()


def test_a_head_for_other_classes_keeps_its_initial_values(published, ours):
    network = ours("vmunet", classes=5)
    before = snapshot(network)
    report = load_published(network, published.build("vmunet").state_dict())
    assert set(report.missing) == {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
    assert set(report.missing.values()) == {"a head of other classes: 2 published, 5 here"}
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in report.missing)


def test_auxiliary_heads_were_not_published(published, ours):
    network = ours("vmunet", auxiliary_heads=True)
    report = load_published(network, published.build("vmunet").state_dict())
    assert set(report.missing) == {f"decoder.seg_layers.{i}.{w}" for i in (1, 2, 3) for w in ("weight", "bias")}


def test_batch_norm_in_an_instance_norm_is_reported(published, ours):
    report = load_published(ours("msvmunet", expand_norm="instance"), published.build("msvmunet").state_dict())
    assert {key for key in report.adapted if "expand_norm" in key} == set(report.adapted)
    assert len(report.adapted) == 8
    assert all("running" in key or "num_batches" in key for key in report.unused)
    assert len(report.unused) == 12


def test_nothing_at_all_is_refused_even_if_a_part_is_allowed(published, ours):
    network = ours("vmunet", base_features=20, d_state=5, classes=3)
    with pytest.raises(WeightsError, match=r"nothing of VM-UNet .* fits this network; .*shape"):
        load_published(network, published.build("vmunet").state_dict(), allow_partial=True)


@pytest.mark.parametrize("name", ["mhsvm", "msvmunet"])
def test_weights_of_another_network_are_refused(published, ours, name):
    with pytest.raises(WeightsError, match=f"weights of VM-UNet, which vmunet takes, not {name}"):
        load_published(ours(name), published.build("vmunet").state_dict(), allow_partial=True)


def test_a_network_without_published_weights_is_refused(published):
    network = create_network("mednext", 1, 2, strides=[[1, 1], [2, 2]], base_features=4)
    with pytest.raises(WeightsError, match="published 2D weights are for mhsvm, msvmunet and vmunet"):
        load_published(network, published.build("vmunet").state_dict())


def test_a_wrapped_network_is_refused(published, ours):
    with pytest.raises(WeightsError, match="give the network itself, not a DataParallel around it"):
        load_published(torch.nn.DataParallel(ours("vmunet")), published.build("vmunet").state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(published, ours, value):
    weights = published.build("vmunet").state_dict()
    name = "vmunet.layers.0.blocks.0.ln_1.bias"
    weights[name] = weights[name].clone().fill_(value)
    network = ours("vmunet")
    before = snapshot(network)
    with pytest.raises(WeightsError, match=r"layers\.0\.blocks\.0\.ln_1\.bias holds values that are not finite"):
        load_published(network, weights, allow_partial=True)
    assert all(torch.equal(v, before[key]) for key, v in network.state_dict().items())
