"""Small volumes for the tests of corpora, and files made of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medmamba import cli
from medmamba_pretrain.recipe import Recipe

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


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: no right to")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A store of five CTs of five patients, 2.5 x 2 x 2 mm."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(5):
        image = nibabel.Nifti1Image(body_hu(seed, (30, 28, 24)), np.diag([2.0, 2.0, 2.5, 1.0]))
        image.header.set_xyzt_units("mm")
        (folder / "in").mkdir(exist_ok=True)
        nibabel.save(image, folder / "in" / f"{seed}.nii.gz")
    out = folder / "store"
    command = ["pretrain", "ingest", str(folder / "in"), "--out", str(out), "--spacing", "2.5", "2", "2", "--jobs", "1"]
    assert cli.main(command) == 0
    return out


@pytest.fixture(scope="session")
def recipe_of() -> Callable[..., Recipe]:
    """Makes a recipe for a run of seconds, with some entries changed: 4 x 4 x 4 units, a few thousand parameters."""

    def make(**changes: Any) -> Recipe:
        content = {
            "network": "vmunet",
            "arguments": {
                "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
                "base_features": 4,
                "depths": 1,
                "d_state": 2,
                "routes": ["dhw", "dhw:reverse"],
            },
            "patch_size": [16, 16, 16],
            "batch_size": 4,
            "steps": 6,
            "lr": 1e-3,
            "warmup_steps": 2,
            "validation_patients": 1,
            "validate_every": 4,
            "save_every": 2,
        }
        return Recipe.from_dict({**content, **changes})

    return make
