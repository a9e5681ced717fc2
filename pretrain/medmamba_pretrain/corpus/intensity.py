"""Which intensities are refused, and how the others become int16.

CT stays in HU: rounded and clipped to [-1024, 3071], the range of 12 bits that scanners give; what lies beyond is
padding outside the field of view, or metal. MR has no unit: its range between the 0.01st and 99.99th percentile becomes
0 ... 4095, 12 bits too, and what lies beyond is clipped; ``stored * scale + offset`` gives the file's values back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.inference.reading import ImageRefused

HU_RANGE = (-1024, 3071)
MR_STEPS = 4095
BODY_HU = -500
_SAMPLES_PER_AXIS = 100
_MOST_LABELS = 32
_CT_FILE_RANGE = (-32768, 65535)
_PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)


@dataclass(frozen=True)
class Coding:
    """``stored * scale + offset`` is the value in the file's units."""

    scale: float = 1.0
    offset: float = 0.0
    low: int = HU_RANGE[0]
    high: int = HU_RANGE[1]

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.int16]:
        """Round and clip."""
        if (self.scale, self.offset) != (1.0, 0.0):
            values = (values - np.float32(self.offset)) / np.float32(self.scale)
        coded: NDArray[np.int16] = np.clip(np.rint(values), self.low, self.high).astype(np.int16)
        return coded


def sample_of(values: NDArray[Any]) -> NDArray[Any]:
    """A regular subset of at most about 100 voxels per axis: enough for percentiles."""
    return values[tuple(slice(None, None, max(1, size // _SAMPLES_PER_AXIS)) for size in values.shape)]


def refuse_bad_intensities(values: NDArray[Any], modality: str) -> None:
    """Look at all voxels of a volume for NaN and range, at a regular subset for the rest.

    Raises:
        ImageRefused: "not-finite", "constant", "label-map", "range" or "not-hu".
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        count = int(np.size(values) - np.isfinite(values).sum())
        raise ImageRefused("not-finite", f"{count} voxels are NaN or infinite; replace them")
    limits = _CT_FILE_RANGE if modality == "ct" else (-1e30, 1e30)
    if low < limits[0] or high > limits[1]:
        raise ImageRefused("range", f"values from {low:g} to {high:g}, beyond {limits[0]:g} to {limits[1]:g}")
    sample = sample_of(values)
    first, last = (float(value) for value in np.percentile(sample, [1, 99.9]))
    if first == last:
        raise ImageRefused("constant", f"nearly all voxels are {first:g}")
    distinct = np.unique(sample)
    if distinct.size <= _MOST_LABELS and (distinct == np.rint(distinct)).all():
        raise ImageRefused("label-map", f"only {distinct.size} different values, all whole: labels, not an image")
    if modality == "ct" and (first > -200 or high < 100):
        raise ImageRefused(
            "not-hu",
            f"values from {low:g} to {high:g}, a hundredth of them below {first:g}: HU would have air below -200 and "
            "bone above 100; convert to HU (often: subtract 1024), or use --modality mr",
        )


def body_threshold(values: NDArray[Any], modality: str) -> float:
    """What is brighter belongs to a body: -500 HU; in MR a tenth of the way from dark to bright."""
    if modality == "ct":
        return BODY_HU
    low, high = (float(value) for value in np.percentile(sample_of(values), [0.1, 99]))
    return low + 0.1 * (high - low)


def coding_of(values: NDArray[Any], modality: str) -> Coding:
    """How the values of one volume are stored."""
    if modality == "ct":
        return Coding()
    low, high = (float(value) for value in np.percentile(sample_of(values), [0.01, 99.99]))
    return Coding(scale=max(high - low, 1e-30) / MR_STEPS, offset=low, low=0, high=MR_STEPS)


def summary_of(stored: NDArray[np.int16], coding: Coding) -> dict[str, float]:
    """Mean, standard deviation, extremes and percentiles of a stored volume, in the file's units."""
    sample = sample_of(stored).astype(np.float64) * coding.scale + coding.offset
    names = [f"p{value:g}" for value in _PERCENTILES]
    summary = {"mean": sample.mean(), "std": sample.std()}
    summary |= {"min": stored.min() * coding.scale + coding.offset, "max": stored.max() * coding.scale + coding.offset}
    summary |= dict(zip(names, np.percentile(sample, _PERCENTILES), strict=True))
    return {name: float(f"{value:.6g}") for name, value in summary.items()}
