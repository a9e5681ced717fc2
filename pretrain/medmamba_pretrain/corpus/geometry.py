"""The body of a volume, and its voxels at another spacing. Plain arrays.

Stored arrays are those of :func:`medmamba.inference.orientation.to_canonical`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: The body is searched on a grid of about this spacing.
_SEARCH_MM = 4.0
#: Parts as large as this share of the largest are body too: legs, arms.
_PART_OF_LARGEST = 0.1

Box = tuple[slice, slice, slice]


def body_box(values: NDArray[Any], spacing_mm: Sequence[float], threshold: float) -> Box:
    """The box around what is brighter than ``threshold``, without smaller things such as a table beside a body.

    Returns:
        Slices of D, H, W; all of the volume when nothing is brighter.
    """
    steps = [max(1, round(_SEARCH_MM / size)) for size in spacing_mm]
    parts, count = ndimage.label(values[tuple(slice(None, None, step) for step in steps)] > threshold)
    if not count:
        d, h, w = values.shape
        return slice(0, d), slice(0, h), slice(0, w)
    sizes = np.bincount(parts.ravel())[1:]
    keep = np.flatnonzero(sizes >= _PART_OF_LARGEST * sizes.max()) + 1
    found = np.isin(parts, keep)
    box = []
    for axis, step in enumerate(steps):
        inside = np.flatnonzero(found.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(max(0, (inside[0] - 1) * step), min(values.shape[axis], (inside[-1] + 1) * step + 1)))
    return box[0], box[1], box[2]


@dataclass(frozen=True)
class Resampling:
    """Sample positions along one axis: as many as fit, centred, so that nothing is extrapolated and mirroring commutes.

    Attributes:
        lower: (m,) index of the left neighbour.
        weight: (m,) float32 share of the right one.
        start: position of the first sample in voxels of the source.
    """

    lower: NDArray[np.intp]
    weight: NDArray[np.float32]
    start: float

    @classmethod
    def between(cls, size: int, source_mm: float, target_mm: float) -> Resampling:
        """For an axis of ``size`` voxels."""
        count = max(1, int(size * source_mm / target_mm + 1e-6))
        start = (size - 1) / 2 - (count - 1) / 2 * target_mm / source_mm
        positions = np.clip(start + np.arange(count) * (target_mm / source_mm), 0, size - 1)
        lower = np.minimum(positions.astype(np.intp), max(size - 2, 0))
        return cls(lower, (positions - lower).astype(np.float32), start)

    @property
    def copies(self) -> bool:
        """Whether samples are the source's voxels."""
        return not self.weight.any()

    def of(self, values: NDArray[Any], axis: int) -> NDArray[np.float32]:
        """Linear interpolation along ``axis``."""
        low = np.take(values, self.lower, axis).astype(np.float32)
        if self.copies:
            return low
        high = np.take(values, np.minimum(self.lower + 1, values.shape[axis] - 1), axis).astype(np.float32)
        weight = self.weight.reshape([-1 if other == axis else 1 for other in range(values.ndim)])
        high -= low
        high *= weight
        low += high
        return low


def resampled_slices(values: NDArray[Any], axes: Sequence[Resampling]) -> Iterator[NDArray[np.float32]]:
    """Linear interpolation, one (H, W) slice after the other; working slice by slice stays in the cache.

    Measured on one core for 512 x 512 x 300 from 0.8 to 1.5 mm in plane: 0.12 s, SimpleITK 0.34 s.
    """
    depth, height, width = axes
    cached: dict[int, NDArray[np.float32]] = {}

    def in_plane(index: int) -> NDArray[np.float32]:
        if index not in cached:
            for old in [key for key in cached if key < index - 1]:
                del cached[old]
            cached[index] = width.of(height.of(values[index], 0), 1)
        return cached[index]

    for lower, weight in zip(depth.lower, depth.weight, strict=True):
        low = in_plane(int(lower))
        yield low if not weight else low + weight * (in_plane(int(lower) + 1) - low)


def resampled_affine(
    affine: NDArray[np.float64], box: Box, axes: Sequence[Resampling], ratio: Sequence[float]
) -> NDArray[np.float64]:
    """Affine of the array cut out by ``box`` and resampled; ``ratio`` is target over source spacing, D, H, W."""
    index = np.eye(4)
    for row, (part, axis, factor) in enumerate(zip(box[::-1], axes[::-1], list(ratio)[::-1], strict=True)):
        index[row, row], index[row, 3] = factor, part.start + axis.start
    return affine @ index
