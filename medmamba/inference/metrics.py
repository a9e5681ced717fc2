"""Dice and normalized surface Dice (NSD) of one structure, on a voxel grid with spacing in mm.

Conventions, the same for both:

- neither mask has a voxel: NaN. There was nothing to find and nothing was found; leave it out of means
  (nnU-Net's evaluation does the same).
- exactly one of them is empty: 0.

Sources: Dice, L. R., "Measures of the Amount of Ecologic Association Between Species", Ecology 26 (1945).
NSD: Nikolov, S. et al., "Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
radiotherapy", arXiv:1809.04430 (2018), in the form of Seidlitz, S. et al., "Robust deep learning-based semantic organ
segmentation in hyperspectral images", arXiv:2111.05408 (2021): the surface is the set of border voxels and
every border voxel counts the same. ``monai.metrics.compute_surface_dice(use_subvoxels=False)`` computes that too
and a test compares the two; here it needs numpy and scipy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """Agreement of a prediction with its reference for one structure.

    Attributes:
        dice: 0 to 1, or NaN when both are empty.
        nsd: 0 to 1, or NaN when both are empty.
    """

    dice: float
    nsd: float


def dice(prediction: Mask, reference: Mask) -> float:
    """Twice the common voxels over the sum of both.

    Args:
        prediction: bool, any shape.
        reference: bool, same shape.

    Returns:
        0 to 1; NaN when both are empty.

    Raises:
        ValueError: different shapes, or arrays that are not bool.
    """
    _check(prediction, reference)
    total = int(prediction.sum()) + int(reference.sum())
    return 2.0 * int((prediction & reference).sum()) / total if total else nan


def nsd(prediction: Mask, reference: Mask, *, spacing_mm: Sequence[float], tolerance_mm: float) -> float:
    """Share of both surfaces that lies within a tolerance of the other surface.

    Args:
        prediction: bool, 1 to 3 axes.
        reference: bool, same shape.
        spacing_mm: voxel size along each array axis, in the order of the axes.
        tolerance_mm: distance up to which two surfaces count as the same, inclusive.

    Returns:
        0 to 1; NaN when both are empty, 0 when exactly one is.

    Raises:
        ValueError: different shapes, not bool, a spacing that is not positive or has the wrong length, a negative
            tolerance.
    """
    _check(prediction, reference)
    spacing = [float(size) for size in spacing_mm]
    if len(spacing) != reference.ndim or not all(0 < size < np.inf for size in spacing):
        raise ValueError(f"spacing_mm must hold {reference.ndim} positive numbers, got {list(spacing_mm)}")
    if not tolerance_mm >= 0:
        raise ValueError(f"tolerance_mm must be 0 or more, got {tolerance_mm}")
    if not prediction.any() or not reference.any():
        return 0.0 if prediction.any() or reference.any() else nan
    box = _bounding_box(prediction | reference)
    border_a, border_b = border_voxels(prediction[box]), border_voxels(reference[box])
    # The distance map of a surface: distance of every voxel to the nearest voxel of that surface.
    to_a = ndimage.distance_transform_edt(~border_a, sampling=spacing)
    to_b = ndimage.distance_transform_edt(~border_b, sampling=spacing)
    # Distances are sums of squares under a root; without this slack 1 mm can be farther than 1 mm.
    limit = tolerance_mm * (1 + 1e-9)
    near = int((to_b[border_a] <= limit).sum()) + int((to_a[border_b] <= limit).sum())
    return near / (int(border_a.sum()) + int(border_b.sum()))


def border_voxels(mask: Mask) -> Mask:
    """Voxels of a mask that share a face with the outside; beyond the array is outside.

    Args:
        mask: bool, any shape.

    Returns:
        bool, same shape.
    """
    return mask & ~ndimage.binary_erosion(mask, border_value=0)


def score_structures(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    structures: Mapping[str, int | Sequence[int]],
    *,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> dict[str, Score]:
    """Dice and NSD of every structure of a label map.

    Args:
        prediction: label map, any integer type, 1 to 3 axes.
        reference: label map of the same shape.
        structures: name of each structure to its label, or to the labels that form it (nnU-Net's regions).
        spacing_mm: voxel size along each array axis.
        tolerance_mm: tolerance of the NSD.

    Returns:
        one :class:`Score` per structure, in the order given.

    Raises:
        ValueError: as :func:`nsd`.
    """
    scores = {}
    for name, labels in structures.items():
        wanted = [labels] if isinstance(labels, int) else list(labels)
        ours, theirs = np.isin(prediction, wanted), np.isin(reference, wanted)
        surface = nsd(ours, theirs, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)
        scores[name] = Score(dice=dice(ours, theirs), nsd=surface)
    return scores


def mean_score(scores: Sequence[Score]) -> Score:
    """Mean over scores; NaN entries (structure absent from both) are left out, NaN when nothing remains."""
    return Score(dice=_mean([s.dice for s in scores]), nsd=_mean([s.nsd for s in scores]))


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return sum(known) / len(known) if known else nan


def _check(prediction: Mask, reference: Mask) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    if prediction.dtype != bool or reference.dtype != bool:
        raise ValueError(f"masks must be bool, got {prediction.dtype} and {reference.dtype}")


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    return ndimage.find_objects(mask.astype(np.uint8))[0]
