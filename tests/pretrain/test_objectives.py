"""What is hidden and asked for, what the decoder makes of it, and that a training step reads nothing hidden."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medmamba.networks import NETWORKS, create_network
from medmamba_kernels import resolve_routes
from medmamba_kernels.routes import route_table
from medmamba_pretrain.decoder import ReconstructionDecoder, depth_to_space, scales_of
from medmamba_pretrain.fill import FILLS
from medmamba_pretrain.loss import join_units, normalised_units, restored, split_units
from medmamba_pretrain.masking import mask_at
from medmamba_pretrain.model import Pretraining, decay_statistics
from medmamba_pretrain.objectives import OBJECTIVES, Choices, get_objective

GRIDS = st.lists(st.integers(1, 5), min_size=2, max_size=3).filter(lambda grid: math.prod(grid) > 1)
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
PATCH = (4, 8, 16)


def choices(**changes):
    return Choices(**{"mask_ratio": 0.75, "horizon": 0.2, "routes": ("dhw",), **changes})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(recipe_of, **changes):
    """A small model, an image of two samples and what is hidden of it."""
    recipe = recipe_of(patch_size=PATCH, **changes)
    torch.manual_seed(0)
    network = create_network(recipe.network, 1, 2, **recipe.network_arguments)
    model = Pretraining(network, recipe)
    image = torch.randn(2, 1, *PATCH)
    drawn = [
        get_objective(recipe.objective).draw(
            model.units, Choices(recipe.mask_ratio, recipe.horizon, recipe.fill_routes), generator(i)
        )
        for i in range(2)
    ]
    return model, image, torch.stack([d.visible for d in drawn]), torch.stack([d.target for d in drawn])


def arguments_of(network, geometry="native"):
    scans = {"d_state": 2} if NETWORKS[network].has_scans else {}
    strides = [[1, 1, 1], [1, 4, 4], [2, 2, 2]] if geometry == "faithful" else STRIDES
    return {"strides": strides, "base_features": 4, "depths": 1, "geometry": geometry, **scans}


# Units


@pytest.mark.parametrize("name", OBJECTIVES)
@given(grid=GRIDS, seed=st.integers(0, 100))
def test_something_is_visible_something_is_asked_for_and_nothing_is_both(name, grid, seed):
    hidden = get_objective(name).draw(grid, choices(), generator(seed))
    assert hidden.visible.shape == hidden.target.shape == tuple(grid)
    assert hidden.visible.any()
    assert hidden.target.any()
    assert not (hidden.visible & hidden.target).any()


@given(grid=GRIDS, seed=st.integers(0, 100), route=st.sampled_from(["dhw", "hwd:reverse", "dwh:snake"]))
def test_the_autoregressive_objective_asks_for_what_follows_the_visible_part_of_the_route(grid, seed, route):
    hidden = get_objective("autoregressive").draw(grid, choices(routes=(route,)), generator(seed))
    whole = (1,) * (3 - len(grid)) + tuple(grid)
    order = route_table(resolve_routes([route]), whole).order[0].long()
    states = (hidden.visible.int() + 2 * hidden.target.int()).flatten()[order].tolist()
    seen, asked = states.count(1), states.count(2)
    assert states == [1] * seen + [2] * asked + [0] * (len(states) - seen - asked)
    assert asked == min(max(1, round(0.2 * len(states))), len(states) - 1)


def test_every_length_of_the_visible_part_and_every_route_are_drawn():
    drawn = [
        get_objective("autoregressive").draw((1, 2, 3), choices(routes=("dhw", "dhw:reverse")), generator(seed)).visible
        for seed in range(200)
    ]
    starts = {(bool(v[0, 0, 0]), int(v.sum())) for v in drawn}
    assert starts == {(first, n) for first in (True, False) for n in range(1, 6)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_single_unit_is_refused(name):
    with pytest.raises(ValueError, match="larger patch"):
        get_objective(name).draw((1, 1, 1), choices(), generator())


def test_an_unknown_objective_is_answered_with_the_known_ones():
    with pytest.raises(KeyError, match="mambamim, spark, mae, autoregressive"):
        get_objective("simclr")


# The step


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("noise", [1e6, math.nan])
def test_what_is_hidden_changes_no_bit_of_a_prediction(recipe_of, objective, fill, noise):
    model, image, visible, _ = model_of(recipe_of, objective=objective, fill=fill)
    behind = torch.where(mask_at(visible, PATCH).unsqueeze(1), image, noise * torch.randn_like(image))
    for training in (True, False):
        model.train(training)
        expected = model.predict(image, visible)
        assert torch.equal(model.predict(behind, visible), expected)
        assert not torch.equal(model.predict(image + torch.randn_like(image), visible), expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("geometry", ["native", "faithful"])
def test_one_step_reaches_every_parameter_of_every_network(recipe_of, network, geometry):
    """DistributedDataParallel waits for ever for the gradient of a parameter that takes no part."""
    model, image, visible, target = model_of(
        recipe_of, network=network, arguments=arguments_of(network, geometry), objective="mambamim"
    )
    model(image, visible, target, int(target.sum())).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("fill", FILLS)
def test_one_step_reaches_every_parameter_with_every_objective_and_fill(recipe_of, objective, fill):
    model, image, visible, target = model_of(recipe_of, objective=objective, fill=fill, fill_ends="learned")
    model(image, visible, target, int(target.sum())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_losses_of_parts_of_a_batch_add_up_to_the_loss_of_the_batch(recipe_of):
    model, image, visible, target = model_of(recipe_of, objective="autoregressive", horizon=0.4)
    model = model.double()
    count = int(target.sum())
    parts = [model(image[i : i + 1].double(), visible[i : i + 1], target[i : i + 1], count) for i in range(2)]
    torch.testing.assert_close(sum(parts), model(image.double(), visible, target, count), rtol=1e-12, atol=0)


def test_only_the_target_units_are_in_the_loss(recipe_of):
    model, image, _, target = model_of(recipe_of, objective="autoregressive")
    prediction = torch.randn_like(image).requires_grad_()
    model.loss(prediction, image, target, 1).backward()
    moved = prediction.grad.ne(0).squeeze(1)
    assert torch.equal(moved, mask_at(target, PATCH))


@pytest.mark.parametrize(("fill", "names"), [("toki", {"mean", "min", "max"}), ("toki-paper", {"spectral_radius"})])
def test_token_interpolation_reports_its_decay(recipe_of, fill, names):
    model, *_ = model_of(recipe_of, fill=fill)
    assert decay_statistics(model.fill).keys() == names


def test_other_fills_have_no_decay_to_report(recipe_of):
    assert decay_statistics(model_of(recipe_of, fill="linear")[0].fill) == {}


# Decoder


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("geometry", ["native", "faithful"])
def test_channels_and_strides_of_an_encoder_are_those_of_its_features(network, geometry):
    arguments = arguments_of(network, geometry)
    unet = create_network(network, 3, 2, **arguments)
    channels, strides = scales_of(unet.encoder, unet.total_stride, 3)
    size = [3 * stride for stride in unet.total_stride]
    features = unet.encoder(torch.randn(1, 3, *size))
    assert channels == [feature.shape[1] for feature in features]
    assert [tuple(f.shape[2:]) for f in features] == [
        tuple(whole // s for whole, s in zip(size, stride, strict=True)) for stride in strides
    ]
    assert unet.encoder.training


@pytest.mark.parametrize("finest", [0, 1, 2])
@pytest.mark.parametrize("reads_all", [True, False])
def test_the_decoder_gives_an_image_from_whatever_scales_it_reads(finest, reads_all):
    strides = [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
    decoder = ReconstructionDecoder([4, 6, 8], strides, 2, finest=finest, reads_all_scales=reads_all)
    features = [torch.randn(1, c, *[8 // s for s in stride]) for c, stride in zip([4, 6, 8], strides, strict=True)]
    assert decoder([features[i] for i in decoder.reads]).shape == (1, 2, 8, 8, 8)
    assert list(decoder.reads) == (list(range(finest, 3)) if reads_all else [2])


def test_a_finest_scale_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.1"):
        ReconstructionDecoder([4, 4], [(1, 1), (2, 2)], 1, finest=2)


def test_the_voxels_of_a_position_stay_at_their_position():
    """Channel c * prod(stride) + i of a position is voxel i of its box, in raster order."""
    stride, grid = (1, 2, 3), (2, 1, 2)
    x = torch.arange(2 * 6 * 4).view(1, 12, *grid)
    y = depth_to_space(x, stride)
    for c in range(2):
        for d, h, w in torch.cartesian_prod(*map(torch.arange, y.shape[2:])).tolist():
            inside = (d % 1) * 6 + (h % 2) * 3 + w % 3
            assert y[0, c, d, h, w] == x[0, 6 * c + inside, d, h // 2, w // 3]


# Pictures


def test_joining_units_undoes_splitting_them():
    x = torch.randn(2, 3, 4, 6, 10)
    assert torch.equal(join_units(split_units(x, (2, 3, 5)), x.shape[2:]), x)


def test_a_perfect_prediction_restores_the_image_where_it_was_asked_for():
    torch.manual_seed(0)
    image = 300 * torch.randn(2, 1, 4, 8, 8, dtype=torch.float64) - 100
    units = (2, 2, 4)
    visible, target = torch.zeros(2, 2, *units, dtype=torch.bool)
    visible[:, 0, 0], target[:, 1] = True, True
    perfect = join_units(normalised_units(image, units), image.shape[2:])
    shown = restored(perfect, image, visible, target)
    seen = mask_at(visible | target, image.shape[2:]).unsqueeze(1)
    torch.testing.assert_close(shown, torch.where(seen, image, 0), rtol=1e-12, atol=1e-9)
