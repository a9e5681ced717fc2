"""Laws of Dice and NSD, a brute-force NSD from the definition, and agreement with MONAI."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medmamba.inference.metrics import Mask, Score, border_voxels, dice, mean_score, nsd, score_structures

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (0.7, 2.5, 1.3)]
shapes = st.tuples(*[st.integers(1, 6)] * 3)
masks = shapes.flatmap(lambda shape: hnp.arrays(bool, shape))
mask_pairs = shapes.flatmap(lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape)))
spacings = st.sampled_from(SPACINGS)
tolerances = st.sampled_from([0.0, 0.5, 1.0, 2.9])


def brute_force_nsd(a: Mask, b: Mask, spacing: Sequence[float], tolerance: float) -> float:
    """The definition, voxel by voxel: no distance transform, no erosion."""

    def border(mask: Mask) -> list[tuple[int, ...]]:
        inside = {tuple(int(i) for i in v) for v in np.argwhere(mask)}
        steps = [tuple(s * (axis == k) for k in range(mask.ndim)) for axis in range(mask.ndim) for s in (-1, 1)]
        return [v for v in inside if any(tuple(map(sum, zip(v, s, strict=True))) not in inside for s in steps)]

    def near(surface: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> int:
        def distance(u: tuple[int, ...], v: tuple[int, ...]) -> float:
            return math.dist(
                [i * s for i, s in zip(u, spacing, strict=True)],
                [i * s for i, s in zip(v, spacing, strict=True)],
            )

        return sum(min(distance(u, v) for v in other) <= tolerance + 1e-9 for u in surface)

    surface_a, surface_b = border(a), border(b)
    if not surface_a or not surface_b:
        return 0.0 if surface_a or surface_b else math.nan
    return (near(surface_a, surface_b) + near(surface_b, surface_a)) / (len(surface_a) + len(surface_b))


def ball(shape: tuple[int, ...], centre: Sequence[float], radius_vox: float) -> Mask:
    grid = np.indices(shape)
    offsets = grid - np.asarray(centre).reshape(-1, *[1] * len(shape))
    return (offsets**2).sum(0) <= radius_vox**2


@given(masks.filter(np.any), spacings, tolerances)
def test_a_mask_agrees_perfectly_with_itself(mask, spacing, tolerance):
    assert dice(mask, mask) == 1.0
    assert nsd(mask, mask, spacing_mm=spacing, tolerance_mm=tolerance) == 1.0


@given(mask_pairs, spacings, tolerances)
def test_swapping_prediction_and_reference_changes_nothing(pair, spacing, tolerance):
    a, b = pair
    assert dice(a, b) == pytest.approx(dice(b, a), nan_ok=True)
    options = {"spacing_mm": spacing, "tolerance_mm": tolerance}
    assert nsd(a, b, **options) == pytest.approx(nsd(b, a, **options), nan_ok=True)


@settings(deadline=None)
@given(mask_pairs, spacings, tolerances)
def test_nsd_is_its_definition(pair, spacing, tolerance):
    a, b = pair
    expected = brute_force_nsd(a, b, spacing, tolerance)
    assert nsd(a, b, spacing_mm=spacing, tolerance_mm=tolerance) == pytest.approx(expected, nan_ok=True)


@given(mask_pairs)
def test_dice_is_its_definition_over_sets_of_voxels(pair):
    a, b = ({tuple(v) for v in np.argwhere(mask)} for mask in pair)
    expected = 2 * len(a & b) / (len(a) + len(b)) if a or b else math.nan
    assert dice(*pair) == pytest.approx(expected, nan_ok=True)


@given(mask_pairs.filter(lambda pair: pair[0].any() and pair[1].any()), spacings)
def test_nsd_grows_with_the_tolerance_up_to_one(pair, spacing):
    values = [nsd(*pair, spacing_mm=spacing, tolerance_mm=t) for t in (0.0, 0.5, 1.0, 2.0, 4.0, 100.0)]
    assert values == sorted(values)
    assert values[-1] == 1.0


@given(mask_pairs, spacings, tolerances, st.permutations(range(3)))
def test_axes_may_be_permuted_together_with_their_spacing(pair, spacing, tolerance, axes):
    turned = [mask.transpose(axes) for mask in pair]
    turned_spacing = [spacing[axis] for axis in axes]
    before = nsd(*pair, spacing_mm=spacing, tolerance_mm=tolerance)
    assert nsd(*turned, spacing_mm=turned_spacing, tolerance_mm=tolerance) == pytest.approx(before, nan_ok=True)


@given(mask_pairs, spacings, tolerances, st.integers(1, 3))
def test_empty_space_around_both_changes_nothing(pair, spacing, tolerance, margin):
    padded = [np.pad(mask, margin) for mask in pair]
    before = nsd(*pair, spacing_mm=spacing, tolerance_mm=tolerance)
    assert nsd(*padded, spacing_mm=spacing, tolerance_mm=tolerance) == pytest.approx(before, nan_ok=True)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_a_shift_by_one_voxel_is_forgiven_from_that_voxel_size_on(spacing, axis):
    a = ball((13, 13, 13), (6, 6, 6), 4)
    b = np.roll(a, 1, axis=axis)
    assert nsd(a, b, spacing_mm=spacing, tolerance_mm=spacing[axis]) == 1.0
    below = nsd(a, b, spacing_mm=spacing, tolerance_mm=0.999 * min(spacing))
    assert below < 1.0
    assert below == pytest.approx(brute_force_nsd(a, b, spacing, 0.999 * min(spacing)))


def test_the_spacing_decides_whether_one_voxel_is_within_one_millimetre():
    a = np.zeros((9, 9, 9), bool)
    a[2:7, 2:7, 2:7] = True
    b = np.roll(a, 1, axis=0)
    assert nsd(a, b, spacing_mm=(1, 1, 1), tolerance_mm=1) == 1.0
    # Two opposite faces of 25 voxels move by 3 mm; the other border voxels still overlap or touch within 1 mm.
    assert nsd(a, b, spacing_mm=(3, 1, 1), tolerance_mm=1) == pytest.approx(brute_force_nsd(a, b, (3, 1, 1), 1))
    assert nsd(a, b, spacing_mm=(3, 1, 1), tolerance_mm=1) < 1.0


def test_half_a_cube_has_a_dice_of_two_thirds():
    whole = np.ones((4, 4, 4), bool)
    half = whole.copy()
    half[2:] = False
    assert dice(half, whole) == pytest.approx(2 / 3)


EMPTY, FULL = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)


@pytest.mark.parametrize(("a", "b"), [(EMPTY, FULL), (FULL, EMPTY)], ids=["no prediction", "no reference"])
def test_one_empty_mask_scores_zero(a, b):
    assert dice(a, b) == 0.0
    assert nsd(a, b, spacing_mm=(1, 1, 1), tolerance_mm=5) == 0.0


def test_two_empty_masks_score_nan_and_stay_out_of_the_mean():
    assert math.isnan(dice(EMPTY, EMPTY))
    assert math.isnan(nsd(EMPTY, EMPTY, spacing_mm=(1, 1, 1), tolerance_mm=1))
    absent, half = Score(math.nan, math.nan), Score(0.5, 0.25)
    assert mean_score([absent, half, Score(1.0, 0.75)]) == Score(0.75, 0.5)
    assert math.isnan(mean_score([absent]).dice)
    assert math.isnan(mean_score([]).nsd)


def test_border_voxels_are_those_with_a_face_to_the_outside():
    cube = np.ones((3, 3, 3), bool)
    expected = cube.copy()
    expected[1, 1, 1] = False
    assert np.array_equal(border_voxels(cube), expected)


def test_structures_are_scored_by_label_and_regions_by_their_union():
    reference = np.array([[[0, 1, 1, 2, 2, 0]]])
    prediction = np.array([[[0, 1, 2, 2, 2, 0]]])
    scores = score_structures(
        prediction, reference, {"one": 1, "both": [1, 2], "never": 3}, spacing_mm=(1, 1, 1), tolerance_mm=0
    )
    assert list(scores) == ["one", "both", "never"]
    assert scores["one"].dice == pytest.approx(2 / 3)
    assert scores["both"] == Score(1.0, 1.0)
    assert math.isnan(scores["never"].dice)


BAD = {
    "other shape": ((EMPTY, FULL[:2]), (1, 1, 1), 1, "differ in shape"),
    "labels instead of masks": ((EMPTY.astype(int), FULL), (1, 1, 1), 1, "must be bool"),
    "two spacings": ((EMPTY, FULL), (1, 1), 1, "3 positive numbers"),
    "zero spacing": ((EMPTY, FULL), (1, 0, 1), 1, "3 positive numbers"),
    "infinite spacing": ((EMPTY, FULL), (1, math.inf, 1), 1, "3 positive numbers"),
    "nan tolerance": ((EMPTY, FULL), (1, 1, 1), math.nan, "0 or more"),
    "negative tolerance": ((EMPTY, FULL), (1, 1, 1), -1, "0 or more"),
}


@pytest.mark.parametrize(("pair", "spacing", "tolerance", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_refused(pair, spacing, tolerance, message):
    with pytest.raises(ValueError, match=message):
        nsd(*pair, spacing_mm=spacing, tolerance_mm=tolerance)


@pytest.mark.parametrize(("spacing", "seed"), list(itertools.product(SPACINGS, range(4))), ids=str)
def test_monai_computes_the_same(spacing, seed):
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(seed)
    a = ball((15, 13, 11), rng.uniform(3, 9, 3), rng.uniform(2, 5))
    b = ball((15, 13, 11), rng.uniform(3, 9, 3), rng.uniform(2, 5)) ^ (rng.random((15, 13, 11)) < 0.02)
    pair = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
    # A tolerance that no distance on these grids meets exactly: MONAI compares in float32.
    theirs = metrics.compute_surface_dice(
        *pair, class_thresholds=[1.2345], include_background=True, spacing=list(spacing)
    )
    assert nsd(a, b, spacing_mm=spacing, tolerance_mm=1.2345) == pytest.approx(theirs.item(), abs=1e-6)
    assert dice(a, b) == pytest.approx(metrics.compute_dice(*pair, include_background=True).item(), abs=1e-6)
