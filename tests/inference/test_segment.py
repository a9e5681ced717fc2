"""One volume in memory, in every kind, gets the labels that its file gets."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import SimpleITK
from nibabel.spatialimages import SpatialImage

from medmamba.inference.model import load_model
from medmamba.inference.predictor import ModelPredictor
from medmamba.inference.reading import Image, ImageRefused, read_image
from medmamba.inference.segment import segment


@pytest.fixture(scope="module")
def predictor(package) -> ModelPredictor:
    return ModelPredictor(load_model(package), step=1.0, mirrors=False)


@pytest.fixture
def path(write_image, tmp_path):
    return write_image(tmp_path / "ct.nii.gz")


def test_what_comes_in_comes_out(predictor, path):
    expected = segment(predictor, path)
    assert isinstance(expected, Image)
    assert expected.values.dtype == np.uint8
    assert len(np.unique(expected.values)) > 1
    np.testing.assert_array_equal(segment(predictor, str(path)).values, expected.values)
    np.testing.assert_array_equal(segment(predictor, read_image(path)).values, expected.values)

    ours = segment(predictor, nibabel.load(path))
    np.testing.assert_array_equal(np.asarray(ours.dataobj), expected.values.T)
    np.testing.assert_array_equal(ours.affine, nibabel.load(path).affine)

    itk = SimpleITK.ReadImage(str(path))
    ours = segment(predictor, itk)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(ours), expected.values)
    assert (ours.GetOrigin(), ours.GetDirection()) == (itk.GetOrigin(), itk.GetDirection())

    image = read_image(path)
    ours = segment(predictor, image.values, spacing_mm=image.spacing_mm)
    np.testing.assert_array_equal(ours, expected.values)  # this model takes images as they lie


def test_the_spacing_of_an_array_decides(predictor, path):
    values = read_image(path).values
    wide = segment(predictor, values, spacing_mm=(2.0, 2.0, 2.0))
    assert not np.array_equal(wide, segment(predictor, values, spacing_mm=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("values", "identifier"),
    [
        (np.zeros((2, 3, 4, 5)), "MM-IO-023"),
        (np.zeros((3, 4)), "MM-IO-025"),
        (np.zeros((3, 4, 5), complex), "MM-IO-021"),
        (np.full((3, 4, 5), "a"), "MM-IO-020"),
        (np.full((3, 4, 5), np.nan), "MM-IO-050"),
        (np.full((3, 4, 5), 1e300), "MM-IO-052"),
    ],
)
def test_arrays_that_are_no_image_are_refused_by_name(predictor, values, identifier):
    with pytest.raises(ImageRefused) as refusal:
        segment(predictor, values, spacing_mm=(1.0, 1.0, 1.0))
    assert refusal.value.id == identifier


def test_colours_of_simpleitk_and_affines_without_a_place_are_refused(predictor):
    with pytest.raises(ImageRefused, match="MM-IO-020"):
        segment(predictor, SimpleITK.Image([5, 5, 5], SimpleITK.sitkVectorUInt8, 3))
    with pytest.raises(ImageRefused, match="MM-IO-030"):
        segment(predictor, SpatialImage(np.zeros((4, 5, 6)), np.diag([1.0, 0.0, 1.0, 1.0])))


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0), (1.0, 0.0, 1.0)])
def test_an_array_needs_its_spacing(predictor, spacing):
    with pytest.raises(TypeError, match="needs spacing_mm"):
        segment(predictor, np.zeros((8, 8, 8)), spacing_mm=spacing)


def test_other_things_and_other_numbers_of_channels_are_errors(predictor, path):
    with pytest.raises(TypeError, match="list is no nibabel"):
        segment(predictor, [[[1.0]]])
    with pytest.raises(TypeError, match="spacing of its own"):
        segment(predictor, path, spacing_mm=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"1 channels \(MRI\), 2 were given"):
        segment(predictor, path, path)
