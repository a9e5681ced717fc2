"""From the axes of a file to superior, anterior, right, and back: exchanges and reversals, no resampling.

Canonical arrays are (D, H, W) with D towards superior, H towards anterior and W towards right, the arrays that
nnU-Net's reorienting readers give. An oblique volume keeps its own grid; each of its axes goes to the direction next
to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import nibabel
import numpy as np
from numpy.typing import NDArray

_Scalar = TypeVar("_Scalar", bound=np.generic)
#: Direction cosines that differ by less are equal: headers hold float32.
_SAME_COSINE = 1e-5


@dataclass(frozen=True)
class Orientation:
    """How an array was turned.

    Attributes:
        axes: for each canonical axis, S, A and R, the axis of the file's array (D, H, W) it was; 0, 1 or 2.
        reversed: for each canonical axis, whether it runs against the file's.
        affine: (4, 4) of the canonical array: index (w, h, d) to mm along right, anterior, superior.
    """

    axes: tuple[int, int, int]
    reversed: tuple[bool, bool, bool]
    affine: NDArray[np.float64]

    def apply(self, values: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """Turn an array of the file's grid.

        Args:
            values: (..., D, H, W) of the file.

        Returns:
            (..., S, A, R), same dtype; a view, unless axes were exchanged.
        """
        front = values.ndim - 3
        turned = np.flip(
            values.transpose(*range(front), *(front + axis for axis in self.axes)), self._reversed_axes(front)
        )
        return turned if self.axes == (0, 1, 2) else np.ascontiguousarray(turned)

    def undo(self, values: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """Turn a canonical array back to the file's grid; inverse of :meth:`apply`, bit for bit.

        Args:
            values: (..., S, A, R).

        Returns:
            (..., D, H, W) of the file, same dtype, contiguous.
        """
        front = values.ndim - 3
        back = np.argsort(self.axes)
        flipped = np.flip(values, self._reversed_axes(front))
        return np.ascontiguousarray(flipped.transpose(*range(front), *(front + int(axis) for axis in back)))

    def _reversed_axes(self, front: int) -> tuple[int, ...]:
        return tuple(front + axis for axis in range(3) if self.reversed[axis])


def to_canonical(values: NDArray[_Scalar], affine: NDArray[np.float64]) -> tuple[NDArray[_Scalar], Orientation]:
    """Exchange and reverse axes so that they point to superior, anterior, right, as well as they can.

    All 48 ways to store one volume give the same array, also where an axis lies exactly between two directions.

    Args:
        values: (D, H, W), x of the file last; any dtype.
        affine: (4, 4), voxel (x, y, z) to mm along right, anterior, superior; see ``Image.affine``.

    Returns:
        The values, a view unless axes were exchanged; and how to undo it.

    Raises:
        ValueError: not three axes.
    """
    if values.ndim != 3:
        raise ValueError(f"values must be (D, H, W), got shape {values.shape}")
    orientation = orientation_of(values.shape, affine)
    return orientation.apply(values), orientation


def orientation_of(shape: Sequence[int], affine: NDArray[np.float64]) -> Orientation:
    """How :func:`to_canonical` turns an array of this shape, (D, H, W), without one."""
    to_ras = _nearest_axes(affine)
    axes = [0, 0, 0]
    flips = [False, False, False]
    for x_axis, (direction, sign) in enumerate(to_ras):
        axes[2 - int(direction)], flips[2 - int(direction)] = 2 - x_axis, bool(sign < 0)
    index = nibabel.orientations.inv_ornt_aff(to_ras, tuple(shape)[::-1])
    return Orientation((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]), affine @ index)


def axis_codes(affine: NDArray[np.float64]) -> str:
    """Where the axes x, y, z of a file point to, e.g. "LPS"."""
    return "".join(str(code) for code in nibabel.orientations.ornt2axcodes(_nearest_axes(affine)))


def _nearest_axes(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """nibabel's orientation of (x, y, z): rows of direction (0 right, 1 anterior, 2 superior) and sign.

    nibabel breaks ties by the order of the axes. It is asked about the axes in an order and with signs that do not
    depend on the file, so that a volume turned by 45 degrees has one canonical array as well.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    rounded = np.round(cosines / _SAME_COSINE) * _SAME_COSINE
    signs = np.array([_sign_of_largest(column) for column in rounded.T])
    order = np.lexsort(rounded * signs)
    standard = np.eye(4)
    standard[:3, :3] = (rounded * signs)[:, order]
    found = np.empty((3, 2))
    found[order] = nibabel.orientations.io_orientation(standard)
    found[:, 1] *= signs
    return found


def _sign_of_largest(column: NDArray[np.float64]) -> float:
    """Sign of the first of the largest components."""
    sizes = np.abs(column)
    first = int(np.flatnonzero(sizes >= sizes.max() - 2 * _SAME_COSINE)[0])
    return float(np.sign(column[first]))
