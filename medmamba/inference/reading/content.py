"""What prediction does about odd values. Corpora have rules of their own: what one voxel spoils they leave out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .image import Image, Note
from .messages import noted, refused

CT_LIMITS = (-32768.0, 65535.0)
#: No scanner gives more; activity concentrations of PET reach millions.
LIMITS = (-(2.0**31), 2.0**31)
_FLOAT32 = float(np.finfo(np.float32).max)
_THIN_VOXELS = 8
_LEAST_EXTENT_MM, _MOST_EXTENT_MM = 10.0, 3000.0


@dataclass(frozen=True)
class Policy:
    """Which values are taken.

    Attributes:
        is_ct: the values are HU, and what lies outside ``CT_LIMITS`` is wrong.
        force: take values outside the limits as they are, with a note.
        max_not_finite: share of voxels that may be NaN or infinite; the smallest finite value takes their place.
    """

    is_ct: bool = False
    force: bool = False
    max_not_finite: float = 0.01


def settled(image: Image, policy: Policy | None = None) -> Image:
    """The image with finite values of a plausible range, and with notes on what was or looks wrong.

    Args:
        policy: default ``Policy()``.

    Returns:
        The same image with more notes; where voxels were replaced, with new values of the same dtype.

    Raises:
        ImageRefused: "not-finite" or "range".
    """
    policy = policy or Policy()
    notes: list[Note] = []
    values = _finite(image.values, policy, notes)
    low, high = float(values.min()), float(values.max())
    _check_range(low, high, policy, notes)
    if low == high:
        notes.append(noted("MM-IO-088", f"all voxels are {low:g}: there is nothing to segment"))
    notes += _notes_on_extent(image)
    return replace(image, values=values, notes=image.notes + tuple(notes))


def has_content(image: Image) -> bool:
    """Whether a settled image has two different values; without, its segmentation is empty."""
    return not any(note.id == "MM-IO-088" for note in image.notes)


def _finite(values: NDArray[Any], policy: Policy, notes: list[Note]) -> NDArray[Any]:
    """``values`` themselves when all are finite, else a copy with the others replaced."""
    if np.isfinite([values.min(), values.max()]).all():  # either is NaN when a voxel is
        return values
    finite = np.isfinite(values)
    count = int(values.size - np.count_nonzero(finite))
    share = count / values.size
    if share > policy.max_not_finite:
        raise refused(
            "MM-IO-050",
            f"{count} voxels ({share:.1%}) are NaN or infinite, {policy.max_not_finite:.0%} are the most; replace them",
        )
    lowest = values[finite].min()
    notes.append(
        noted("MM-IO-087", f"{count} voxels are NaN or infinite; {lowest:g}, the smallest value, replaces them")
    )
    return np.where(finite, values, lowest)


def _check_range(low: float, high: float, policy: Policy, notes: list[Note]) -> None:
    found = f"values from {low:g} to {high:g}"
    if max(-low, high) > _FLOAT32:
        raise refused("MM-IO-052", f"{found}, beyond float32; rescale them")
    limits = CT_LIMITS if policy.is_ct else LIMITS
    if limits[0] <= low and high <= limits[1]:
        return
    text = f"{found}, beyond {limits[0]:g} to {limits[1]:g}"
    if not policy.force:
        raise refused("MM-IO-051", f"{text}; correct them, or take them as they are with --force")
    notes.append(noted("MM-IO-089", f"{text}, taken as they are"))


def _notes_on_extent(image: Image) -> list[Note]:
    notes = []
    sizes = " x ".join(map(str, image.values.shape))
    if min(image.values.shape) < _THIN_VOXELS:
        notes.append(noted("MM-IO-086", f"{sizes} voxels: fewer than {_THIN_VOXELS} along an axis"))
    extent = [size * step for size, step in zip(image.values.shape, image.spacing_mm, strict=True)]
    if max(extent) < _LEAST_EXTENT_MM or max(extent) > _MOST_EXTENT_MM:
        text = " x ".join(f"{length:g}" for length in extent)
        notes.append(noted("MM-IO-091", f"{text} mm across (D, H, W); are its spacing and unit right?"))
    return notes
