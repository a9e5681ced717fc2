"""The target and the loss of masked units, by hand and by laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba_pretrain.loss import normalised_units, reconstruction_loss, split_units
from medmamba_pretrain.masking import draw_units, mask_at


def case(units=(2, 1, 3), size=(2, 4, 1), batch=2, channels=2):
    torch.manual_seed(0)
    shape = [n * s for n, s in zip(units, size, strict=True)]
    prediction, image = torch.randn(2, batch, channels, *shape, dtype=torch.float64)
    return prediction, image, draw_units(batch, units, 0.5)


def test_two_units_by_hand():
    # Units (1, 3) and (2, 2): the first has mean 2 and unbiased variance 2.
    image = torch.tensor([[[[1.0, 3.0, 2.0, 2.0]]]], dtype=torch.float64)
    deviation = 1 / math.sqrt(2 + 1e-6)
    expected = torch.tensor([[-deviation, deviation], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(normalised_units(image, (1, 2))[0, 0, :, 0], expected, rtol=1e-14, atol=0)
    prediction = torch.tensor([[[[0.0, 1.0, 5.0, 7.0]]]], dtype=torch.float64)
    first, second = torch.tensor([[[False, True]]]), torch.tensor([[[True, False]]])
    both = torch.zeros(1, 1, 2, dtype=torch.bool)
    error = (deviation**2 + (1 - deviation) ** 2) / 2
    assert reconstruction_loss(prediction, image, first).item() == pytest.approx(error, rel=1e-14)
    assert reconstruction_loss(prediction, image, second).item() == pytest.approx((25 + 49) / 2, rel=1e-14)
    assert reconstruction_loss(prediction, image, both).item() == pytest.approx((error + 37) / 2, rel=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=3))
def test_units_are_split_where_masks_are_repeated(axes):
    units, size = zip(*axes, strict=True)
    image = torch.arange(2 * 3 * math.prod(units) * math.prod(size)).view(2, 3, *[n * s for n, s in axes])
    split = split_units(image, units)
    assert split.shape == (2, *units, 3, math.prod(size))
    for index in range(math.prod(units)):
        unit = torch.unravel_index(torch.tensor(index), units)
        chosen = torch.zeros(2, *units, dtype=torch.bool)
        chosen[(slice(None), *unit)] = True
        inside = mask_at(chosen, image.shape[2:]).unsqueeze(1).expand_as(image)
        assert torch.equal(split[(slice(None), *unit)].flatten(), image[inside])


def test_the_target_is_that_of_a_loop_over_units():
    _, image, visible = case()
    target = normalised_units(image, visible.shape[1:])
    for sample, d, w, channel in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 3, 2))).tolist():
        voxels = image[sample, channel, 2 * d : 2 * d + 2, :, w].flatten()
        expected = (voxels - voxels.mean()) / torch.sqrt(voxels.var() + 1e-6)
        torch.testing.assert_close(target[sample, d, 0, w, channel], expected)


@pytest.mark.parametrize("value", [-1000.1, 0.0, 1 / 3, 3e4])
def test_a_unit_of_air_is_zero_and_its_loss_finite(value):
    image = torch.full((1, 1, 16, 32, 16), value)
    # In float32 the mean of 4096 times -1000.1 is 3e-4 off, which the 1e-6 turns into a target of 0.3.
    assert not normalised_units(image, (1, 2, 1)).any()
    prediction = torch.ones_like(image).requires_grad_()
    loss = reconstruction_loss(prediction, image, torch.zeros(1, 1, 2, 1, dtype=torch.bool))
    loss.backward()
    assert loss == 1
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(("scale", "shift"), [(425.0, -175.0), (0.01, 3.0), (1.0, 1e4), (-2.0, 0.0)])
def test_of_a_units_intensity_scale_the_target_knows_nothing_but_the_1e_6(scale, shift):
    _, image, visible = case()
    units = visible.shape[1:]
    one = torch.zeros(1, *units, dtype=torch.bool)
    one[0, 1, 0, 2] = True
    changed = torch.where(mask_at(one, image.shape[2:]).unsqueeze(1), image * scale + shift, image)
    variance = split_units(image, units)[:, 1, 0, 2].var(-1, keepdim=True)
    expected = normalised_units(image, units)
    expected[:, 1, 0, 2] *= torch.sqrt((variance + 1e-6) / (variance + 1e-6 / scale**2)) * math.copysign(1, scale)
    torch.testing.assert_close(normalised_units(changed, units), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hidden", [0.0, 1e6, math.inf, math.nan])
def test_visible_units_have_no_part_in_loss_and_gradient(hidden):
    prediction, image, visible = case()
    shown = mask_at(visible, image.shape[2:]).unsqueeze(1).expand_as(image)
    x = torch.where(shown, hidden, prediction).requires_grad_()
    loss = reconstruction_loss(x, torch.where(shown, -hidden, image), visible)
    loss.backward()
    assert torch.equal(loss, reconstruction_loss(prediction, image, visible))
    assert not x.grad[shown].any()
    assert (x.grad[~shown] != 0).all()


def test_masked_units_count_alike_whatever_sample_they_are_in():
    prediction, image, visible = case()
    visible[0, 0] = True
    whole = reconstruction_loss(prediction, image, visible)
    errors = [
        (split_units(prediction, visible.shape[1:])[place] - normalised_units(image, visible.shape[1:])[place])
        .square()
        .mean()
        for place in map(tuple, (~visible).nonzero().tolist())
    ]
    torch.testing.assert_close(whole, torch.stack(errors).mean())


def test_processes_that_divide_by_the_global_number_add_up_to_one_batch():
    prediction, image, visible = case()
    visible[0, 0] = True  # the two processes have different numbers
    total = int((~visible).sum())
    parts = [
        reconstruction_loss(prediction[i : i + 1], image[i : i + 1], visible[i : i + 1], masked_units=total)
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), reconstruction_loss(prediction, image, visible))
    everything = torch.ones_like(visible)
    assert reconstruction_loss(prediction, image, everything, masked_units=torch.tensor(total)) == 0


def test_a_prediction_in_half_precision_gives_a_loss_in_single():
    prediction, image, visible = case()
    loss = reconstruction_loss(prediction.bfloat16(), image.half(), visible)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reconstruction_loss(prediction, image, visible), rtol=2e-2, atol=0)


def test_refusals_say_what_to_do():
    prediction, image, visible = case()
    with pytest.raises(ValueError, match="raise the mask ratio"):
        reconstruction_loss(prediction, image, torch.ones_like(visible))
    with pytest.raises(ValueError, match="one shape"):
        reconstruction_loss(prediction[:, :1], image, visible)
    with pytest.raises(ValueError, match="must be bool"):
        reconstruction_loss(prediction, image, visible.float())
    with pytest.raises(ValueError, match="not divisible"):
        reconstruction_loss(prediction[..., :-1], image[..., :-1], visible)
    with pytest.raises(ValueError, match="use units of several voxels"):
        normalised_units(image, image.shape[2:])
