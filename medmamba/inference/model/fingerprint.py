"""What the training images were like, reduced to what tells whether a new image is like them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .values import items, mapping, number, optional, whole, wrong

#: Over the training cases.
PERCENTILES = (0, 1, 5, 50, 95, 99, 100)
#: Of the voxels with a label, over all cases together.
INTENSITIES = ("mean", "std", "min", "percentile_00_5", "median", "percentile_99_5", "max")
_PER_AXIS = ("spacing_mm", "shape_vox", "extent_mm")


def reduce_fingerprint(fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Percentiles of spacing, shape and extent per axis, and the intensities, of nnU-Net's dataset_fingerprint.json.

    Axes are those of the arrays that the reader gives: in the orientation of the package, before nnU-Net's transpose.
    Shapes are those after its crop to the nonzero region.

    Returns:
        plain JSON values, or None for a fingerprint without cases.
    """
    spacings, shapes = fingerprint.get("spacings"), fingerprint.get("shapes_after_crop")
    if not spacings or not shapes:
        return None
    spacing, shape = np.asarray(spacings, dtype=float), np.asarray(shapes, dtype=float)
    columns = dict(zip(_PER_AXIS, (spacing, shape, spacing * shape), strict=True))
    properties = fingerprint.get("foreground_intensity_properties_per_channel") or {}
    return {
        "cases": len(spacings),
        "percentiles": list(PERCENTILES),
        **{name: np.percentile(values, PERCENTILES, axis=0).tolist() for name, values in columns.items()},
        "intensities": {
            str(channel): {key: _finite(values.get(key)) for key in INTENSITIES}
            for channel, values in properties.items()
        },
    }


def check_fingerprint(value: object) -> None:
    """Raise unless this is what :func:`reduce_fingerprint` returns.

    Raises:
        ModelRefused: MM-MD-009.
    """
    if value is None:
        return
    where = "fingerprint"
    given = mapping(value, where, ("cases", "percentiles", *_PER_AXIS, "intensities"))
    whole(given["cases"], f"{where}.cases", 1)
    if given["percentiles"] != list(PERCENTILES):
        wrong(f"{where}.percentiles", given["percentiles"], f"{list(PERCENTILES)}")
    for name in _PER_AXIS:
        rows = items(given[name], f"{where}.{name}", _row, length=len(PERCENTILES))
        if any(low > high for lower, upper in pairwise(rows) for low, high in _pairs(lower, upper)):
            wrong(f"{where}.{name}", rows, "percentiles that rise")
    for channel, properties in mapping(given["intensities"], f"{where}.intensities").items():
        place = f"{where}.intensities.{channel}"
        for key, each in mapping(properties, place, INTENSITIES).items():
            optional(each, f"{place}.{key}", number)


def _row(value: object, where: str) -> list[float]:
    row = items(value, where, number, length=3)
    if min(row) <= 0:
        wrong(where, row, "numbers above 0")
    return row


def _pairs(lower: Sequence[float], upper: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(lower, upper, strict=True))


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
