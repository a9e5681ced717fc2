"""Small images for the tests of prediction."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

import medmamba.inference

ODD_IMAGES = Path(__file__).resolve().parents[1] / "data" / "odd_images"

WriteNifti = Callable[..., Path]


@pytest.fixture(scope="session")
def odd_images() -> Path:
    """Folder of small real files; see its README."""
    return ODD_IMAGES


@pytest.fixture(scope="session")
def write_nifti() -> WriteNifti:
    """Writes a plain NIfTI in mm that is read without a note; ``seed`` decides its voxels."""

    def write(path: Path, seed: int = 0, shape_xyz: tuple[int, ...] = (9, 10, 11), spacing: float = 2.0) -> Path:
        values = np.random.default_rng(seed).integers(-1000, 1000, shape_xyz).astype(np.int16)
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = (-20, 7, 100)
        image = nibabel.Nifti1Image(values, affine)
        image.header.set_xyzt_units("mm")
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, path)
        return path

    return write


@pytest.fixture(scope="session")
def ids_in() -> Callable[[str], set[str]]:
    """Ids of messages in the code of a folder of medmamba.inference ("" for all), the catalogue left out."""

    def ids(folder: str) -> set[str]:
        found = set()
        for path in (Path(medmamba.inference.__path__[0]) / folder).rglob("*.py"):
            if path.name != "messages.py":
                values = [
                    node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
                ]
                found |= {value for value in values if isinstance(value, str) and value.startswith("MM-IO-")}
        return found

    return ids
