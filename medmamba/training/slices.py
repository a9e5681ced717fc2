"""Planes through a volume with tinted labels, as one picture; numpy only, quick enough for every few epochs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.palette import COLOURS

#: Pixels of the longer side that small patches are enlarged to, in whole steps.
_SIDE = 192
_GAP = 2
_OPACITY = 0.55
_RGB = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS], dtype=np.float32)


def slices_picture(image: NDArray[Any], reference: NDArray[Any], prediction: NDArray[Any]) -> NDArray[np.uint8]:
    """One row per plane, with the image, the reference on it and the prediction on it from left to right.

    The planes lie across each axis where the reference holds most foreground (without any: the prediction, and else in
    the middle); in 2D there is one.

    Args:
        image: (D, H, W) or (H, W), any number type.
        reference: labels of the same shape; up to 0 is background.
        prediction: labels of the same shape.

    Returns:
        (height, width, 3), red, green and blue.

    Raises:
        ValueError: the shapes differ, are neither 2D nor 3D, or are empty.
    """
    shape = image.shape
    if not shape == reference.shape == prediction.shape or len(shape) not in (2, 3) or not image.size:
        raise ValueError(
            f"image, reference and prediction must be of one shape, 2D or 3D, got {shape}, {reference.shape} and "
            f"{prediction.shape}"
        )
    grey = _grey(image)
    rows = []
    for plane in _planes(reference, prediction):
        shown = grey[plane]
        factor = max(1, _SIDE // max(shown.shape))
        cells = [
            np.repeat(shown[..., None], 3, axis=-1),
            *(_tinted(shown, labels[plane]) for labels in (reference, prediction)),
        ]
        rows.append([np.repeat(np.repeat(cell, factor, axis=0), factor, axis=1) for cell in cells])
    width = max(row[0].shape[1] for row in rows)
    stacked = [np.concatenate([_padded(cell, width) for cell in row], axis=1) for row in rows]
    return np.concatenate(stacked, axis=0).round().astype(np.uint8)


def _planes(reference: NDArray[Any], prediction: NDArray[Any]) -> list[tuple[slice | int, ...]]:
    if reference.ndim == 2:
        return [(slice(None), slice(None))]
    mask = reference > 0 if (reference > 0).any() else prediction > 0
    planes: list[tuple[slice | int, ...]] = []
    for axis, size in enumerate(mask.shape):
        counts = mask.sum(tuple(other for other in range(3) if other != axis))
        best = int(counts.argmax()) if counts.any() else size // 2
        planes.append(tuple(best if other == axis else slice(None) for other in range(3)))
    return planes


def _grey(image: NDArray[Any]) -> NDArray[np.float32]:
    """0..255, with the outermost half percent at either end cut; what is not finite is black."""
    values = np.asarray(image, dtype=np.float32)
    finite = np.isfinite(values)
    low, high = np.percentile(values[finite], (0.5, 99.5)) if finite.any() else (0.0, 0.0)
    scaled = (np.where(finite, values, low) - low) / (high - low if high > low else 1.0)
    return np.asarray(np.clip(scaled, 0, 1) * 255, dtype=np.float32)


def _tinted(grey: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[np.float32]:
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    foreground = labels > 0
    colour = _RGB[(labels[foreground].astype(np.int64) - 1) % len(_RGB)]
    rgb[foreground] = (1 - _OPACITY) * rgb[foreground] + _OPACITY * colour
    return rgb


def _padded(cell: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Black on the right and below, between this cell and the next."""
    return np.pad(cell, ((0, _GAP), (0, width - cell.shape[1] + _GAP), (0, 0)))
