"""From one image to the array that is stored, or the reason why not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmamba.inference.orientation import to_canonical
from medmamba.inference.reading import Image, ImageRefused

from . import geometry, intensity
from .settings import Settings

#: Volumes with a shorter side, before or after resampling, hold less than one crop worth learning from.
MIN_SIZE = 16
SPACING_LIMITS_MM = (0.2, 10.0)
MAX_SHEAR = 0.01
#: Spacings are rounded to this. A power of two: usual ones, as 360 / 512 or 500 / 512, lie on its grid, not between.
_SPACING_GRID_MM = 2.0**-14


@dataclass(frozen=True)
class Prepared:
    """A volume as it is stored.

    Attributes:
        values: (D, H, W) int16, axes towards superior, anterior, right.
        affine: (4, 4), index (w, h, d) to mm along right, anterior, superior.
        coding: from stored to original values.
    """

    values: NDArray[np.int16]
    affine: NDArray[np.float64]
    coding: intensity.Coding


def prepare(image: Image, settings: Settings) -> Prepared:
    """Orient, check, cut out the body, resample and round.

    Copies of one volume with exchanged or reversed axes give the same array.

    Raises:
        ImageRefused: see the codes in ``docs/how-to/pretrain-corpus.md``.
    """
    _refuse_bad_geometry(image)
    stated = {"CT": "ct", "MR": "mr"}.get(image.tags.get("modality", "").upper())
    if stated not in (None, settings.modality):
        raise ImageRefused("modality", f"its header says {stated.upper()}; use a store of that modality")
    values, orientation = to_canonical(image.values, image.affine)
    affine = orientation.affine
    # Headers hold float32: without rounding, copies in other orientations would differ in the last digits.
    sizes = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    spacing = [round(float(size) / _SPACING_GRID_MM) * _SPACING_GRID_MM for size in sizes]
    intensity.refuse_bad_intensities(values, settings.modality)
    box = geometry.body_box(values, spacing, intensity.body_threshold(values, settings.modality))
    body = values[box]
    axes = [
        geometry.Resampling.between(size, source, target)
        for size, source, target in zip(body.shape, spacing, settings.spacing_mm, strict=True)
    ]
    shape = tuple(axis.lower.size for axis in axes)
    if min(shape) < MIN_SIZE:
        raise ImageRefused("too-small", f"its body is {_times(shape)} voxels after resampling; {MIN_SIZE} is the least")
    coding = intensity.coding_of(body, settings.modality)
    stored = np.empty(shape, np.int16)
    for target, resampled in zip(stored, geometry.resampled_slices(body, axes), strict=True):
        target[:] = coding.encode(resampled)
    ratio = [target / source for source, target in zip(spacing, settings.spacing_mm, strict=True)]
    return Prepared(stored, geometry.resampled_affine(affine, box, axes, ratio), coding)


def _refuse_bad_geometry(image: Image) -> None:
    if image.shear > MAX_SHEAR:
        degrees = np.degrees(np.arcsin(min(image.shear, 1.0)))
        raise ImageRefused(
            "sheared", f"its axes miss right angles by {degrees:.1f} degrees (a tilted gantry?); resample it to a box"
        )
    if min(image.values.shape) < MIN_SIZE:
        raise ImageRefused("too-small", f"{_times(image.values.shape)} voxels; every axis needs {MIN_SIZE}")
    low, high = SPACING_LIMITS_MM
    if min(image.spacing_mm) < low or max(image.spacing_mm) > high:
        spacing = _times([round(size, 4) for size in image.spacing_mm])
        raise ImageRefused("spacing", f"spacing of {spacing} mm, outside {low} to {high}; check the header")


def _times(sizes: Iterable[float]) -> str:
    return " x ".join(str(size) for size in sizes)
