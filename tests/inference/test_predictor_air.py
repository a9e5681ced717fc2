"""Which tiles are left out because nothing is in them, and what that can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization, ZScoreNormalization

from medmamba.inference.model.labels import read_labels
from medmamba.inference.predictor.air import empty_voxels, is_masked
from medmamba.inference.predictor.labels import background_logits, decide
from medmamba.inference.predictor.window import Skip, count_tiles, predict_slabs, tile_starts

TILE, STEP = (4, 6, 5), 0.5
BACKGROUND = torch.tensor([0.0, -10.0])


class Foreground:
    """Answers foreground everywhere, and counts the questions."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return torch.cat([-1 - x.abs(), 1 + x.abs()], 1)


def logits_of(image, forward, empty=None, background=BACKGROUND):
    skip = None if empty is None else Skip(empty, background)
    slabs = predict_slabs(image, forward, tile=TILE, step=STEP, classes=2, skip=skip)
    return torch.cat([slab.clone() for slab in slabs], 1)


def reach_of_tiles(shape, empty):
    """(in a tile with content, in a tile without) per voxel."""
    computed, skipped = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    starts = [tile_starts(size, part, STEP) for size, part in zip(shape, TILE, strict=True)]
    for first in torch.cartesian_prod(*map(torch.tensor, starts)).tolist():
        place = tuple(slice(start, start + part) for start, part in zip(first, TILE, strict=True))
        (skipped if empty[place].all() else computed)[place] = True
    return computed, skipped


def test_an_image_without_empty_tiles_gives_the_same_bits():
    image = torch.randn(1, 9, 13, 17, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(image.shape[1:], dtype=torch.bool)
    empty[::2] = True  # much of the image, but no whole tile
    assert torch.equal(logits_of(image, Foreground(), empty), logits_of(image, Foreground()))


def test_an_image_of_air_makes_no_forward_pass_and_is_background():
    image, network = torch.full((1, 9, 13, 17), -1.5), Foreground()
    logits = logits_of(image, network, empty_voxels(image, [False]))
    assert network.calls == 0
    assert (logits.argmax(0) == 0).all()


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(4, 16), st.integers(6, 20), st.integers(5, 18)),
    low=st.tuples(*[st.floats(0, 1)] * 3),
    size=st.floats(0, 1),
)
def test_the_rule_decides_those_empty_voxels_that_no_computed_tile_covers(shape, low, size):
    """A network that says foreground everywhere shows where it was not asked."""
    image = torch.full((1, *shape), -1.0)
    body = tuple(slice(int(s * at), int(s * at) + max(1, int(s * size))) for s, at in zip(shape, low, strict=True))
    image[0, *body] = 1.0
    empty = empty_voxels(image, [False])
    computed, skipped = reach_of_tiles(shape, empty)
    network, everywhere = Foreground(), Foreground()
    logits, complete = logits_of(image, network, empty), logits_of(image, everywhere)
    assert torch.equal(logits.argmax(0) == 1, computed)
    assert empty[~computed].all()
    assert torch.equal(logits[:, ~skipped], complete[:, ~skipped])
    assert everywhere.calls == count_tiles(shape, TILE, STEP) >= network.calls
    assert empty[skipped].all()


def in_hu(seed=0):
    """(24, 24, 24) HU: a body in air, both with noise."""
    generator = np.random.default_rng(seed)
    values = generator.normal(-1000, 15, (24, 24, 24)).astype(np.float32)
    values[8:16, 8:16, 8:16] = generator.normal(40, 15, (8, 8, 8))
    return values


def ct(values, lowest, highest=300.0):
    properties = {"mean": 50.0, "std": 100.0, "percentile_00_5": lowest, "percentile_99_5": highest}
    return torch.from_numpy(CTNormalization(False, properties).run(values.copy()))[None]


def test_noisy_air_of_a_ct_is_empty_where_the_model_segments_nothing_as_dark():
    inside = np.zeros((24, 24, 24), bool)
    inside[8:16, 8:16, 8:16] = True
    assert np.array_equal(empty_voxels(ct(in_hu(), -150.0), [False]).numpy(), ~inside)


def test_air_is_computed_for_a_model_that_segments_air():
    assert empty_voxels(ct(in_hu(), -1020.0), [False]).float().mean() < 0.15


def test_what_is_brighter_than_the_model_knows_is_not_empty():
    values = in_hu()
    values[10:14, 10:14, 10:14] = 3000
    assert not empty_voxels(ct(values, -150.0), [False])[8:16, 8:16, 8:16].any()


def test_zeros_around_a_masked_brain_are_empty_and_dark_tissue_is_not():
    generator = np.random.default_rng(0)
    brain = np.zeros((20, 20, 20), bool)
    brain[5:15, 5:15, 5:15] = True
    values = np.where(brain, generator.normal(500, 100, brain.shape), 0).astype(np.float32)
    within = ZScoreNormalization(True, {}).run(values.copy(), np.where(brain, 0, -1))
    whole = ZScoreNormalization(False, {}).run(values.copy())
    for image, masked in ((within, True), (whole, False)):
        assert np.array_equal(empty_voxels(torch.from_numpy(image)[None], [masked]).numpy(), ~brain)


def test_noise_around_a_head_is_not_empty():
    values = np.random.default_rng(0).rayleigh(5, (20, 20, 20)).astype(np.float32)
    values[5:15, 5:15, 5:15] += 500
    image = torch.from_numpy(ZScoreNormalization(False, {}).run(values))[None]
    assert empty_voxels(image, [False]).sum() <= 8


def test_one_bright_voxel_does_not_make_the_rest_empty():
    """Intensities of real files reach a thousand times the tissue."""
    values = np.random.default_rng(0).normal(300, 50, (16, 16, 16)).astype(np.float32)
    values[3, 3, 3] = 300_000
    image = torch.from_numpy(ZScoreNormalization(False, {}).run(values))[None]
    assert empty_voxels(image, [False]).float().mean() < 0.01


def test_a_voxel_is_empty_only_if_it_is_so_in_every_channel():
    image = torch.zeros(2, 4, 4, 4)
    image[0, :2] = 1
    image[1, :, :2] = 1
    assert torch.equal(empty_voxels(image, [False, False]), (image == 0).all(0))


def test_only_the_z_score_knows_a_mask():
    schemes = ["ZScoreNormalization", "CTNormalization", "ZScoreNormalization"]
    assert is_masked(schemes, [True, True, False]) == [True, False, False]


@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
def test_voxels_of_no_tile_are_decided_as_background(has_regions):
    dataset = {"labels": {"background": 0, "a": 1, "b": 2}}
    if has_regions:
        dataset = {"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1, 2]}
    labels = read_labels(dataset)
    assert decide(background_logits(labels).view(-1, 1, 1), labels).tolist() == [[0]]
