"""From an image to the stored array: one orientation, one spacing, the body, int16."""

from __future__ import annotations

import itertools
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.inference.reading import Image, ImageRefused
from medmamba_pretrain.corpus import geometry, intensity
from medmamba_pretrain.corpus.prepare import prepare
from medmamba_pretrain.corpus.settings import Settings

THREE_MM = Settings(spacing_mm=(3.0, 2.5, 2.0))
ORIENTATIONS = [
    np.stack([axes, flips], axis=1)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def image_of(values_xyz: np.ndarray, affine: np.ndarray) -> Image:
    return Image(np.ascontiguousarray(values_xyz.T), affine)


def refusal(image: Image, settings: Settings = THREE_MM) -> str:
    with pytest.raises(ImageRefused) as caught:
        prepare(image, settings)
    return caught.value.code


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(nibabel.orientations.ornt2axcodes(o)))
def test_copies_in_all_48_orientations_give_the_same_array(ct, affine, orientation):
    coarse = Settings(spacing_mm=(2.7, 2.2, 2.9))
    expected = prepare(image_of(ct, affine), coarse)
    turned = nibabel.Nifti1Image(ct, affine).as_reoriented(orientation)
    found = prepare(image_of(np.asarray(turned.dataobj), turned.affine), coarse)
    assert np.array_equal(found.values, expected.values)
    assert np.allclose(found.affine, expected.affine)


def test_a_volume_that_is_canonical_already_is_only_cut(ct, affine):
    ct = ct.clip(*intensity.HU_RANGE)
    stored = prepare(image_of(ct, affine), THREE_MM).values
    d, h, w = stored.shape
    # All of the body is in it: where the cut-out lies, the source is nowhere else brighter than air.
    places = [
        (z, y, x)
        for z in range(ct.shape[2] - d + 1)
        for y in range(ct.shape[1] - h + 1)
        for x in range(ct.shape[0] - w + 1)
        if np.array_equal(ct.T[z : z + d, y : y + h, x : x + w], stored)
    ]
    ((z, y, x),) = places
    outside = np.ones(ct.T.shape, bool)
    outside[z : z + d, y : y + h, x : x + w] = False
    assert (ct.T[outside] <= intensity.BODY_HU).all()


@pytest.mark.parametrize("oblique_degrees", [0, 10])
def test_the_affine_of_the_stored_array_places_every_voxel(ct, affine, oblique_degrees):
    """Intensities that are a linear function of the position stay that function, as interpolation is linear too."""
    angle = np.deg2rad(oblique_degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    flipped = turn @ affine @ np.diag([-1, -1, 1, 1])
    index = np.stack(np.meshgrid(*map(np.arange, ct.shape), indexing="ij"), -1)
    mm = index @ flipped[:3, :3].T + flipped[:3, 3]
    gradient = np.array([3.0, -4.0, 5.0])
    values = (mm - mm.mean((0, 1, 2))) @ gradient * 2 - 100
    prepared = prepare(Image(values.T, flipped), Settings(spacing_mm=(2.0, 2.0, 3.0)))
    index = np.stack(np.meshgrid(*map(np.arange, prepared.values.T.shape), indexing="ij"), -1)
    found_mm = index @ prepared.affine[:3, :3].T + prepared.affine[:3, 3]
    expected = (found_mm - mm.mean((0, 1, 2))) @ gradient * 2 - 100
    low, high = intensity.HU_RANGE
    inside = (expected > low) & (expected < high)  # clipped elsewhere
    for axis in range(3):  # and at a border the nearest voxel is taken
        inside &= np.isin(np.indices(inside.shape)[axis], [0, inside.shape[axis] - 1], invert=True)
    assert inside.mean() > 0.5
    assert np.abs(prepared.values.T - expected)[inside].max() < 0.51  # rounded to whole HU
    spacing = np.linalg.norm(prepared.affine[:3, :3], axis=0)
    assert spacing == pytest.approx((3.0, 2.0, 2.0), rel=1e-4)


@given(size=st.integers(1, 40), source=st.floats(0.3, 6), target=st.floats(0.3, 6))
def test_resampling_along_an_axis_never_extrapolates_and_commutes_with_mirroring(size, source, target):
    axis = geometry.Resampling.between(size, source, target)
    ramp = np.arange(size, dtype=np.float64)
    found = axis.of(ramp, 0)
    assert found.min() >= 0
    assert found.max() <= size - 1
    assert np.allclose(axis.of(ramp[::-1].copy(), 0), found[::-1], atol=1e-4)
    free = found[(found > 0) & (found < size - 1)]  # the others are a border voxel, at most half a voxel beyond it
    assert np.allclose(np.diff(free), target / source, rtol=1e-3, atol=1e-4)
    assert axis.start >= -0.5


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 4)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_slice_by_slice_is_interpolation_of_the_whole(shape, spacing, seed):
    from scipy import ndimage

    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    axes = [geometry.Resampling.between(n, mm, 1.5) for n, mm in zip(shape, spacing, strict=True)]
    found = np.stack(list(geometry.resampled_slices(values, axes)))
    positions = np.meshgrid(*(axis.lower + axis.weight.astype(np.float64) for axis in axes), indexing="ij")
    assert np.allclose(found, ndimage.map_coordinates(values, positions, order=1, mode="nearest"), atol=1e-4)


def test_the_body_is_cut_out_without_the_table_but_with_both_legs():
    hu = np.full((40, 60, 60), -1000, np.int16)
    hu[5:35, 20:35, 8:22] = 40
    hu[5:35, 20:35, 36:50] = 40
    hu[5:35, 55, 5:9] = 0  # a rail of a table
    box = geometry.body_box(hu, (4.0, 4.0, 4.0), intensity.BODY_HU)
    assert box == (slice(4, 36), slice(19, 36), slice(7, 51))


def test_a_volume_without_a_body_is_kept_whole():
    assert geometry.body_box(np.full((4, 5, 6), -1000), (1, 1, 1), -500) == (slice(0, 4), slice(0, 5), slice(0, 6))


def shifted(by: float):
    return lambda hu: hu + by


def with_voxel(value: float):
    def change(hu: np.ndarray) -> np.ndarray:
        hu = hu.astype(np.float64)
        hu[10, 10, 10] = value
        return hu

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (with_voxel(np.nan), "not-finite"),
        (with_voxel(np.inf), "not-finite"),
        (with_voxel(-np.inf), "not-finite"),
        (with_voxel(1e300), "range"),
        (with_voxel(70000), "range"),
        (shifted(1024), "not-hu"),
        (lambda hu: (hu + 1024.0) / 3000, "not-hu"),
        (lambda hu: (hu - hu.mean()) / hu.std(), "not-hu"),
        (lambda hu: np.clip(hu, -1000, 50), "not-hu"),
        (lambda hu: np.full_like(hu, -1000), "constant"),
        (lambda hu: np.where(hu > 500, 2, np.where(hu > -500, 1, -1000)), "label-map"),
        (lambda hu: hu[:, :, :15], "too-small"),
        (lambda hu: np.where(np.abs(np.arange(hu.shape[0])[:, None, None] - 16) < 4, hu, -1000), "too-small"),
    ],
)
def test_unfit_intensities_and_sizes_are_refused(ct, affine, change, code):
    assert refusal(image_of(change(ct), affine)) == code


@pytest.mark.parametrize("change", [lambda hu: hu, shifted(0.25), with_voxel(-32768), with_voxel(30000)])
def test_hu_with_odd_values_are_accepted_and_clipped(ct, affine, change):
    stored = prepare(image_of(change(ct), affine), THREE_MM).values
    assert stored.dtype == np.int16
    assert stored.min() >= -1024
    assert stored.max() <= 3071


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda a: a @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "sheared"),
        (lambda a: a @ np.diag([10, 1, 1, 1]), "spacing"),
        (lambda a: a @ np.diag([0.05, 1, 1, 1]), "spacing"),
    ],
)
def test_unfit_geometry_is_refused(ct, affine, change, code):
    assert refusal(image_of(ct, change(affine))) == code


def test_an_image_that_says_it_is_of_another_modality_is_refused(ct, affine):
    image = replace(image_of(ct, affine), tags={"modality": "MR"})
    assert refusal(image) == "modality"
    assert prepare(image, replace(THREE_MM, modality="mr"))


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_mr_comes_back_within_one_of_4096_steps(ct, affine, factor):
    values = (ct.astype(np.float64) + 1000).clip(0) * factor
    prepared = prepare(image_of(values, affine), replace(THREE_MM, modality="mr"))
    back = prepared.values * prepared.coding.scale + prepared.coding.offset
    step = prepared.coding.scale
    plain = prepare(image_of(ct, affine), THREE_MM)
    assert plain.values.shape == prepared.values.shape  # the same cut, as the body stands out in both
    difference = np.abs(back - (plain.values.astype(np.float64) + 1000).clip(0) * factor)
    assert np.quantile(difference, 0.999) <= step / 2 + 25 * factor  # beyond: clipped percentiles
    assert np.median(difference) <= step / 2
