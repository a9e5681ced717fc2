"""Planes through a volume with tinted labels."""

from __future__ import annotations

import numpy as np
import pytest

from medmamba.palette import COLOURS
from medmamba.training.slices import slices_picture


def cells(picture: np.ndarray) -> list[np.ndarray]:
    """Image, reference and prediction."""
    return np.split(picture, 3, axis=1)


def colours_in(cell: np.ndarray, of: tuple[str, ...] = COLOURS) -> set[str]:
    """Which colours tint black voxels of a cell."""
    tints = {colour: np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) * 0.55 for colour in of}
    return {colour for colour, tint in tints.items() if (np.abs(cell - tint).max(-1) <= 1).any()}


def test_each_column_shows_its_own_labels():
    image = np.zeros((6, 8, 10))
    reference, prediction = np.zeros((2, 6, 8, 10), np.int16)
    reference[2:4, 3, 4:6] = 1
    prediction[2:4, 3, 4:6] = 2
    plain, expected, predicted = cells(slices_picture(image, reference, prediction))
    assert colours_in(plain) == set()
    assert colours_in(expected) == {COLOURS[0]}
    assert colours_in(predicted) == {COLOURS[1]}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_lie_where_the_reference_is_largest(axis):
    reference = np.zeros((9, 9, 9), np.int16)
    reference[4, 4, 4] = 1
    index: list[slice | int] = [slice(3, 6)] * 3
    index[axis] = 7
    reference[tuple(index)] = 2
    height = 9 * (192 // 9)
    _, expected, _ = cells(slices_picture(np.zeros((9, 9, 9)), reference, np.zeros_like(reference)))
    plane = expected[axis * (height + 2) : axis * (height + 2) + height]
    tint = np.abs(plane - np.array([0x56, 0xB4, 0xE9]) * 0.55).max(-1) <= 1
    assert tint.sum() == 9 * (192 // 9) ** 2


def test_the_prediction_says_where_without_a_reference():
    prediction = np.zeros((5, 5, 5), np.int16)
    prediction[1, 1, 1] = 1
    *_, predicted = cells(slices_picture(np.zeros((5, 5, 5)), np.zeros_like(prediction), prediction))
    assert colours_in(predicted) == {COLOURS[0]}


@pytest.mark.parametrize(("shape", "planes"), [((20, 30), 1), ((20, 30, 10), 3), ((1, 1, 1), 3)], ids=str)
def test_there_is_one_row_per_plane(shape, planes):
    empty = np.zeros(shape, np.int16)
    picture = slices_picture(np.random.default_rng(0).random(shape), empty, empty)
    sides = [shape] if planes == 1 else [(shape[1], shape[2]), (shape[0], shape[2]), (shape[0], shape[1])]
    factors = [192 // max(side) for side in sides]
    assert picture.shape[0] == sum(side[0] * factor + 2 for side, factor in zip(sides, factors, strict=True))
    assert picture.shape[1] == 3 * (max(side[1] * factor for side, factor in zip(sides, factors, strict=True)) + 2)


def test_there_are_always_colours_for_labels():
    labels = np.arange(100, dtype=np.uint8).reshape(10, 10)
    _, expected, _ = cells(slices_picture(np.zeros((10, 10)), labels, labels))
    assert colours_in(expected) == set(COLOURS)


def test_labels_below_zero_are_background():
    labels = np.full((4, 4), -1)
    plain, expected, _ = cells(slices_picture(np.arange(16.0).reshape(4, 4), labels, labels))
    assert np.array_equal(plain, expected)


def test_an_image_that_is_not_finite_or_constant_is_drawn():
    empty = np.zeros((4, 4), np.int16)
    for image in (
        np.full((4, 4), np.nan),
        np.full((4, 4), 7.0),
        np.array([[np.inf, 1], [2, 3]]).repeat(2, 0).repeat(2, 1),
    ):
        assert slices_picture(image, empty, empty).dtype == np.uint8


@pytest.mark.parametrize("shapes", [((4, 4), (4, 4), (4, 5)), ((4,),) * 3, ((0, 4),) * 3], ids=str)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="must be of one shape"):
        slices_picture(*(np.zeros(shape) for shape in shapes))
