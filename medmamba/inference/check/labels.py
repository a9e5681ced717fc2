"""Label maps beside their images, for training and for reference segmentations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.inference.reading import Image, read_image
from medmamba.inference.reading.geometry import corners_apart

from .case_report import SAME_GRID, CaseReport
from .finding import Finding
from .overlay import Overlays

_HIGHEST_LABEL = 65535  # of uint16, the widest type that nnU-Net writes


@dataclass(frozen=True)
class LabelCheck:
    """A check of cases against their label maps; see ``Check``.

    Attributes:
        files: label map by id of its case.
        allow_shift: take a label map that lies elsewhere, with a note, when size and spacing are the image's.
        overlays: draws those that lie elsewhere.
    """

    files: Mapping[str, Path]
    allow_shift: bool = False
    overlays: Overlays | None = None

    def __call__(self, report: CaseReport) -> Iterable[Finding]:
        """What is wrong or odd about the label map of a case."""
        path = self.files.get(report.case)
        if path is None:
            return [Finding.of("MM-IO-065", f"no label map is named {report.case}; add it or remove the image")]
        try:
            label = read_image(path)
        except Exception as error:
            return [Finding.of_error(error, path.name)]
        of_grid = _of_grid(report, label, path.name, self.allow_shift)
        if of_grid and self.overlays is not None:
            self.overlays.draw(report.case, label)
        return [
            *(Finding.of_note(note, path.name) for note in label.notes),
            *of_grid,
            *_of_values(label.values, path.name),
        ]


def _of_grid(report: CaseReport, label: Image, name: str, allow_shift: bool) -> list[Finding]:
    spacing = " x ".join(f"{size:.4g}" for size in report.spacing_mm)
    shape = " x ".join(map(str, report.shape))
    if label.values.shape != report.shape or not np.allclose(label.spacing_mm, report.spacing_mm, rtol=0.01):
        own_spacing = " x ".join(f"{size:.4g}" for size in label.spacing_mm)
        own_shape = " x ".join(map(str, label.values.shape))
        text = f"{own_shape} voxels of {own_spacing} mm (D, H, W), the image {shape} of {spacing}; resample it"
        return [Finding.of("MM-IO-066", text, name)]
    apart = corners_apart(np.array(report.affine), label.affine, report.shape[::-1])
    if apart <= SAME_GRID * min(report.spacing_mm):
        return []
    text = f"a corner lies {apart:.3g} mm from that of the image"
    if allow_shift:
        return [Finding.of("MM-IO-092", f"{text}, as allowed", name)]
    return [
        Finding.of("MM-IO-066", f"{text}; look at both (--overlays FOLDER), then correct it or say --allow-shift", name)
    ]


def _of_values(values: NDArray[Any], name: str) -> list[Finding]:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= _HIGHEST_LABEL):  # NaN is neither
        text = f"values from {low:g} to {high:g}; labels are whole numbers from 0 to {_HIGHEST_LABEL}"
        return [Finding.of("MM-IO-067", text, name)]
    if values.dtype.kind == "f" and not all(np.array_equal(plane, np.rint(plane)) for plane in values):
        return [Finding.of("MM-IO-067", "values between whole numbers; labels are classes, resample the nearest", name)]
    if high == 0:
        return [Finding.of("MM-IO-093", "all of it is background", name)]
    return []
