"""What a reader returns, and what it raises."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


class ImageRefused(Exception):
    """An image that must not be used: why, and what to do about it.

    Args:
        code: short and stable, e.g. "truncated"; for tables and tests.
        text: one sentence with what is wrong, the numbers, and the remedy; without the path.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)  # both, so that it survives the way back from another process
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


@dataclass(frozen=True)
class Image:
    """One scalar volume as it lies in its file, with where it lies in the patient.

    Attributes:
        values: (D, H, W), the file's x axis last; any real dtype, rescaled to the file's units (HU for CT).
        affine: (4, 4) float64; voxel index (w, h, d), i.e. (x, y, z) of the file, to mm along right, anterior,
            superior.
        notes: what was odd but not wrong, one sentence each.
        tags: what the file says about itself, as text: "modality" and "patient" of DICOM.
    """

    values: NDArray[np.generic]
    affine: NDArray[np.float64]
    notes: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along D, H, W."""
        x, y, z = (float(value) for value in np.linalg.norm(self.affine[:3, :3], axis=0))
        return z, y, x

    @property
    def shear(self) -> float:
        """Largest cosine between two axes of the grid: 0 for a box, 0.17 for a gantry tilted by 10 degrees."""
        axes = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(np.abs(axes.T @ axes - np.eye(3)).max())


def checked_affine(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """``affine`` itself.

    Raises:
        ImageRefused: it holds NaN, or an axis without length, or axes in one plane.
    """
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3])
        raise ImageRefused("geometry", f"the header places voxels nowhere (affine {rows}); write the geometry anew")
    return affine
