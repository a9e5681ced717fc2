"""Which tiles are left out because nothing is in them, and what that can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization, ZScoreNormalization

from medmamba.inference.model.labels import read_labels
from medmamba.inference.predictor.air import air_mask, empty_voxels, is_masked, surroundings
from medmamba.inference.predictor.case import Window, _segmented, pad_to_tile
from medmamba.inference.predictor.labels import background_logits, decide
from medmamba.inference.predictor.model_predictor import with_token_mask
from medmamba.inference.predictor.resample import axis_maps
from medmamba.inference.predictor.window import Skip, count_tiles, predict_slabs, tile_starts, with_mirroring
from medmamba.mixers import token_mask
from medmamba.networks import create_network

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


# --- what is no token to the scans ----------------------------------------------------------------------------------


def flooded(empty, margin):
    """Empty voxels that a flood from the border reaches, further than a margin from all others; slow and plain."""
    shape = empty.shape
    on_border = lambda voxel: any(i in (0, size - 1) for i, size in zip(voxel, shape, strict=True))  # noqa: E731
    reached, todo = set(), [tuple(v) for v in np.argwhere(empty) if on_border(v)]
    while todo:
        voxel = todo.pop()
        if voxel in reached or not all(0 <= i < size for i, size in zip(voxel, shape, strict=True)):
            continue
        if empty[voxel]:
            reached.add(voxel)
            todo += [tuple(np.add(voxel, step)) for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int))]
    others = [voxel for voxel in np.ndindex(shape) if voxel not in reached]
    result = np.zeros(shape, bool)
    for voxel in reached:
        result[voxel] = all(np.abs(np.subtract(voxel, other)).max() > margin for other in others)
    return result


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    share=st.floats(0, 1),
    margin=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_surroundings_are_what_a_flood_from_the_border_reaches_but_a_margin(shape, share, margin, seed):
    empty = np.random.default_rng(seed).random(shape) < share
    assert np.array_equal(surroundings(torch.from_numpy(empty), margin).numpy(), flooded(empty, margin))


def test_air_within_a_body_stays():
    values = torch.from_numpy(in_hu())
    values[11:13, 11:13, 11:13] = -1000.0  # a lung
    air = air_mask(values, -500.0, margin_vox=2)
    inside = torch.zeros(24, 24, 24, dtype=torch.bool)
    inside[6:18, 6:18, 6:18] = True
    assert torch.equal(air, ~inside)


def test_the_channel_of_the_mask_says_what_is_neither_padding_nor_air():
    labels = read_labels({"labels": {"background": 0, "a": 1}})
    image = torch.full((1, 9, 24, 20), -1.0)
    image[0, 4:6, 10:14, 8:12] = 1.0
    tile = (16, 24, 20)
    seen = []

    def forward(x):
        seen.append(x.clone())
        return torch.zeros(1, 2, *x.shape[2:])

    maps = axis_maps(image.shape[1:], image.shape[1:], [1.0] * 3, [1.0] * 3)
    empty = empty_voxels(image, [False])
    _segmented(image, empty, maps, tile, forward, labels, Window(masks_air=True))
    (x,) = seen
    kept = torch.zeros(9, 24, 20)
    kept[1:9, 7:17, 5:15] = 1
    expected, inner = pad_to_tile(kept[None], tile)
    assert torch.equal(x[0, -1], expected[0])
    assert torch.equal(x[0, :1], pad_to_tile(image, tile)[0])
    assert inner[0] == slice(3, 12)


def test_a_mask_is_mirrored_with_its_tile_and_reaches_the_scans():
    torch.manual_seed(0)
    network = create_network("vmunet", 1, 2, strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]], base_features=8, d_state=2)
    network = network.eval()
    x = torch.randn(1, 1, 8, 12, 16)
    kept = torch.zeros(1, 1, 8, 12, 16)
    kept[..., :5] = 1
    forward = with_mirroring(with_token_mask(network, network), [0, 2])
    with torch.no_grad():
        expected = torch.zeros(1, 2, 8, 12, 16)
        for axes in ([], [2], [4], [2, 4]):
            with token_mask(network, kept[:, 0].flip([axis - 1 for axis in axes]) > 0):
                expected += network(x.flip(axes)).flip(axes) / 4
        found = forward(torch.cat([x, kept], 1))
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, with_mirroring(network, [0, 2])(x))
