"""What holds for the affine of every format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from .image import Header, Image, Note
from .messages import noted, refused

#: Largest cosine between axes that still counts as a right angle: rounding in headers stays far below.
MAX_SHEAR = 0.01
#: Volume spanned by axes of length 1; below it they lie in one plane.
_LEAST_VOLUME = 1e-6
#: SimpleITK's axes point left and posterior, ours right and anterior.
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def checked_affine(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """``affine`` itself.

    Raises:
        ImageRefused: it holds NaN, or an axis without length, or axes in one plane.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    is_finite = bool(np.isfinite(affine).all() and np.isfinite(lengths).all())
    if not is_finite or not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < _LEAST_VOLUME:
        rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3])
        raise refused("MM-IO-030", f"the header places voxels nowhere (affine {rows}); write the geometry anew")
    return affine


def affine_from_lps(steps: NDArray[np.float64], origin: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) to right, anterior, superior; from steps per voxel (columns of (3, 3)) and origin in SimpleITK's axes.

    Raises:
        ImageRefused: as :func:`checked_affine`.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps, origin
    return checked_affine(_TO_RAS @ affine)


def corners_apart(first: NDArray[np.float64], second: NDArray[np.float64], shape_xyz: Sequence[int]) -> float:
    """Largest distance, in mm, between the places that two affines give to a corner voxel; NaN if one holds NaN."""
    corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in shape_xyz))], np.float64)
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())


def itk_header(kind: str, direction: Iterable[float], origin: Iterable[float], spacing_mm: Iterable[float]) -> Header:
    """Header facts of a format that SimpleITK reads."""
    return Header(
        kind=kind,
        direction=tuple(float(value) for value in direction),
        origin=tuple(float(value) for value in origin),
        spacing=tuple(float(value) for value in spacing_mm),
    )


def notes_on_shear(image: Image) -> tuple[Note, ...]:
    """A note when the axes miss right angles by more than ``MAX_SHEAR``."""
    if image.shear <= MAX_SHEAR:
        return ()
    degrees = np.degrees(np.arcsin(min(image.shear, 1.0)))
    return (noted("MM-IO-083", f"its axes miss right angles by {degrees:.1f} degrees (a tilted gantry?)"),)
