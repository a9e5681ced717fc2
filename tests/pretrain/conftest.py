"""Small volumes for the tests of corpora, and files made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ODD_IMAGES = CHECKOUT / "tests" / "data" / "odd_images"
SHAPE_XYZ = (26, 22, 20)
SPACING_MM = (2.0, 2.5, 3.0)

WriteCT = Callable[..., Path]


def body_hu(seed: int = 0, shape: tuple[int, ...] = SHAPE_XYZ) -> np.ndarray:
    """(x, y, z) int16 HU: an ellipsoid of tissue with a bone off its centre, in air; no two axes or sides alike."""
    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    radius = sum((axis / scale) ** 2 for axis, scale in zip(axes, (0.95, 0.9, 0.98), strict=True))
    bone = sum((axis - at) ** 2 for axis, at in zip(axes, (0.3, -0.2, 0.1), strict=True)) < 0.04
    hu = np.where(radius < 1, 40.0 + 30 * axes[0], -1000.0) + 900 * bone
    return (hu + generator.normal(0, 8, shape)).round().astype(np.int16)


@pytest.fixture
def odd_images() -> Path:
    """Folder of small real files; see its README."""
    return ODD_IMAGES


@pytest.fixture
def affine() -> np.ndarray:
    """(4, 4) of a volume whose axes point right, anterior, superior."""
    return np.array([[2.0, 0, 0, -20], [0, 2.5, 0, 7], [0, 0, 3.0, 100], [0, 0, 0, 1]])


@pytest.fixture
def ct() -> np.ndarray:
    """(x, y, z) int16 HU."""
    return body_hu()


@pytest.fixture
def write_ct(affine: np.ndarray) -> WriteCT:
    """Writes a NIfTI: a path, and either a seed or the (x, y, z) values."""

    def write(path: Path, seed: int = 0, values: np.ndarray | None = None, at: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(body_hu(seed) if values is None else values, affine if at is None else at)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, path)
        return path

    return write
