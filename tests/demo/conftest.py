"""Small datasets in nnU-Net raw layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK


def _write_volume(path: Path, array: np.ndarray, spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> None:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing_mm[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))


@pytest.fixture
def write_volume() -> Callable[..., None]:
    """Write (D, H, W) to a file, with the spacing in the same order."""
    return _write_volume


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write a dataset of bright blobs on noise, one label each, and return its folder."""

    def make(
        name: str = "Dataset777_Blobs",
        *,
        num_cases: int = 4,
        num_channels: int = 1,
        ending: str = ".nii.gz",
        shape: tuple[int, int, int] = (20, 24, 28),
        spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
        **changes: Any,
    ) -> Path:
        rng = np.random.default_rng(0)
        folder = tmp_path / name
        for number in range(num_cases):
            centre = np.array(shape) / 2 + rng.uniform(-3, 3, 3)
            distance = np.sqrt(((np.indices(shape) - centre.reshape(3, 1, 1, 1)) ** 2).sum(0))
            label = ((distance < 7).astype(np.uint8)) + (distance < 4)
            for channel in range(num_channels):
                image = (label * 100 + rng.normal(0, 10, shape)).astype(np.float32)
                _write_volume(folder / "imagesTr" / f"case_{number}_{channel:04d}{ending}", image, spacing_mm)
            _write_volume(folder / "labelsTr" / f"case_{number}{ending}", label, spacing_mm)
        description = {
            "channel_names": {str(channel): f"channel {channel}" for channel in range(num_channels)},
            "labels": {"background": 0, "shell": 1, "core": 2},
            "numTraining": num_cases,
            "file_ending": ending,
        }
        (folder / "dataset.json").write_text(json.dumps({**description, **changes}))
        return folder

    return make
