"""One canonical array for every way to store a volume, and an exact way back."""

from __future__ import annotations

import itertools

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.eulerangles import euler2mat

from medmamba.inference.orientation import axis_codes, to_canonical

ORIENTATIONS = [
    np.stack([axes, flips], axis=1)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
SIZES = st.tuples(*[st.integers(1, 5)] * 3)
ANGLES = st.tuples(*[st.integers(-180, 180)] * 3)
SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.7421875, 1.0, 3.0])] * 3)


def volume(shape: tuple[int, ...]) -> np.ndarray:
    """No two voxels alike."""
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


def affine_of(angles_degrees, spacing_mm) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = euler2mat(*np.deg2rad(angles_degrees)) * spacing_mm
    affine[:3, 3] = (-20, 7, 100)
    return affine


def stored(values: np.ndarray, affine: np.ndarray, orientation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with other axes; the affine in the precision of a header."""
    turned = nibabel.Nifti1Image(values.T, affine).as_reoriented(orientation)
    return np.asarray(turned.dataobj).T, turned.affine.astype(np.float32).astype(np.float64)


@settings(max_examples=60, deadline=None)
@given(SIZES, ANGLES, SPACINGS)
def test_all_48_ways_to_store_a_volume_give_one_array_on_one_grid(shape, angles, spacing):
    values, affine = volume(shape), affine_of(angles, spacing)
    expected, place = to_canonical(values, affine)
    for orientation in ORIENTATIONS:
        found, other = to_canonical(*stored(values, affine, orientation))
        assert np.array_equal(found, expected)
        assert np.allclose(other.affine, place.affine, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    SIZES, ANGLES, SPACINGS, st.sampled_from(ORIENTATIONS), st.sampled_from(["uint8", "int16", "float32", "float64"])
)
def test_undo_is_the_inverse_bit_for_bit(shape, angles, spacing, orientation, dtype):
    values, affine = stored(volume(shape), affine_of(angles, spacing), orientation)
    bits = np.random.default_rng(0).bytes(values.size * np.dtype(dtype).itemsize)
    values = np.frombuffer(bits, dtype).reshape(values.shape)  # NaN of every kind among them
    canonical, place = to_canonical(values, affine)
    back = place.undo(canonical)
    assert back.dtype == values.dtype
    assert back.flags.c_contiguous
    assert back.tobytes() == values.tobytes()
    assert place.apply(back).tobytes() == canonical.tobytes()


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(nibabel.orientations.ornt2axcodes(o)))
def test_every_voxel_keeps_its_place_in_the_patient(orientation):
    values, affine = stored(volume((3, 4, 5)), affine_of((10, -20, 30), (1, 2, 3)), orientation)
    canonical, place = to_canonical(values, affine)
    for index in itertools.product(*map(range, canonical.shape)):
        position = place.affine @ (*index[::-1], 1)
        x, y, z = np.rint(np.linalg.inv(affine) @ position).astype(int)[:3]
        assert canonical[index] == values[z, y, x]


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.integers(-44, 44)] * 3).filter(lambda angles: sum(map(abs, angles)) < 45), SPACINGS)
def test_less_than_half_a_right_angle_changes_no_axis(angles, spacing):
    values, affine = volume((2, 3, 4)), affine_of(angles, spacing)
    canonical, place = to_canonical(values, affine)
    assert np.array_equal(canonical, values)
    assert np.array_equal(place.affine, affine)
    assert axis_codes(affine) == "RAS"


@settings(max_examples=200, deadline=None)
@given(ANGLES.filter(lambda angles: not any(angle % 45 == 0 for angle in angles)), SPACINGS)
def test_axes_are_those_of_nibabel(angles, spacing):
    """And so of nnU-Net's reorienting readers."""
    affine = affine_of(angles, spacing)
    assert axis_codes(affine) == "".join(nibabel.aff2axcodes(affine))
    values = volume((2, 3, 4))
    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(values.T, affine))
    canonical, place = to_canonical(values, affine)
    assert np.array_equal(canonical, np.asarray(expected.dataobj).T)
    assert np.allclose(place.affine, expected.affine)


def test_axes_before_the_volume_are_left_alone():
    values, affine = stored(volume((3, 4, 5)), np.eye(4), ORIENTATIONS[21])
    _, place = to_canonical(values, affine)
    channels = np.stack([values, values + 100])
    assert np.array_equal(place.apply(channels)[1], place.apply(values) + 100)
    assert np.array_equal(place.undo(place.apply(channels)), channels)


def test_reversed_axes_alone_copy_nothing():
    values, affine = stored(volume((3, 4, 5)), np.eye(4), ORIENTATIONS[7])
    canonical, _ = to_canonical(values, affine)
    assert np.shares_memory(canonical, values)


def test_four_axes_are_refused():
    with pytest.raises(ValueError, match="D, H, W"):
        to_canonical(np.zeros((2, 3, 4, 5)), np.eye(4))
