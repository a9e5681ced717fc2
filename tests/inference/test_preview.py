"""The picture of a case."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from PIL import Image as Picture

from medmamba.inference.preview import write_preview
from medmamba.inference.reading import Image, read_image

NAMES = {0: "background", 1: "bright"}


def drawn(path, image, labels) -> np.ndarray:
    write_preview(path, image, labels, NAMES)
    with Picture.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("axes", ["LPS", "SAL", "PIR", "ILA"])
def test_one_volume_looks_the_same_however_it_lies_in_its_file(write_image, tmp_path, axes):
    first = nibabel.load(write_image(tmp_path / "a.nii.gz", at=np.diag([1.5, 2.0, 3.0, 1.0])))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(first.as_reoriented(turn), tmp_path / "turned.nii.gz")
    pictures = []
    for name in ("a.nii.gz", "turned.nii.gz"):
        image = read_image(tmp_path / name)
        pictures.append(drawn(tmp_path / "p" / f"{name}.png", image, (image.values > 50).astype(np.uint8)))
    assert pictures[0].shape == pictures[1].shape
    assert difference(*pictures) == 0
    nothing = drawn(tmp_path / "p" / "b.png", image, np.zeros(image.values.shape, np.uint8))
    assert nothing.shape != pictures[0].shape or difference(nothing, pictures[0]) > 1


def test_a_large_volume_keeps_its_proportions(tmp_path):
    values = np.zeros((300, 600, 10), np.int16)
    values[100:200, 200:400, 3:7] = 100
    large = Image(values, np.diag([20.0, 1.0, 1.0, 1.0]))
    # As large in mm, with every third voxel.
    small = Image(values[::3, ::3], np.diag([20.0, 3.0, 3.0, 1.0]))
    pictures = [
        drawn(tmp_path / f"{k}.png", image, (image.values > 50).astype(np.uint8))
        for k, image in enumerate((large, small))
    ]
    assert np.abs(np.subtract(pictures[0].shape, pictures[1].shape)).max() <= 8
