"""Where a NIfTI lies: one rule, and a note wherever the header contradicts itself.

The sform counts if its code is above 0, else the qform if its code is above 0, else the spacing alone. nnU-Net's
readers disagree about this among themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .geometry import checked_affine, corners_apart
from .image import Header, Note
from .messages import noted, refused

_UNITS_MM = {1: 1000.0, 2: 1.0, 3: 0.001}
_PLAUSIBLE_SPACING_MM = (0.01, 50.0)
_SAME_SPACING = 0.01
#: A quaternion may be longer than 1 by this: other tools round it to three digits.
_QUATERNION_SLACK = 1e-3


def header_facts(header: Any) -> Header:
    """What a writer needs to give the geometry back."""
    return Header(
        kind="nifti",
        version=1 if header.sizeof_hdr == 348 else 2,
        pixdim=_numbers(header["pixdim"]),
        xyzt_units=int(header["xyzt_units"]),
        sform_code=int(header["sform_code"]),
        qform_code=int(header["qform_code"]),
        sform=tuple(_numbers(header[f"srow_{axis}"]) for axis in "xyz"),
        quaternion=_numbers([header[f"quatern_{part}"] for part in "bcd"]),
        qoffset=_numbers([header[f"qoffset_{axis}"] for axis in "xyz"]),
    )


def place(header: Any, shape: tuple[int, int, int], prefer: str, notes: list[Note]) -> NDArray[np.float64]:
    """(4, 4), voxel (x, y, z) to mm along right, anterior, superior.

    Args:
        shape: (x, y, z).
        prefer: "sform" or "qform"; which one counts where both are set.
        notes: what is odd is added here.

    Raises:
        ImageRefused: the form that counts places voxels nowhere.
    """
    facts = header_facts(header)
    sform = np.array([*facts.sform, (0, 0, 0, 1)], np.float64) if facts.sform_code > 0 else None
    spacing = _spacing(facts, notes)
    qform = _qform(facts, spacing, notes) if facts.qform_code > 0 else None
    if sform is not None and not (prefer == "qform" and qform is not None):
        _compare_spacing(sform, spacing, notes)
        affine = sform
    elif qform is not None:
        affine = qform
    elif facts.qform_code > 0:
        numbers = " ".join(f"{value:g}" for value in facts.quaternion)
        raise refused("MM-IO-031", f"only the qform is set, and its quaternion ({numbers}) is none; write it anew")
    else:
        affine = np.diag([*spacing, 1.0])
        notes.append(
            noted(
                "MM-IO-080",
                "neither qform nor sform is set: the orientation is unknown, taken as right, anterior, superior",
            )
        )
    factor = _mm_per_unit(affine, facts.xyzt_units & 7, notes)
    if sform is not None and qform is not None:
        taken = "qform" if affine is qform else "sform"
        _compare_forms(_scaled(sform, factor), _scaled(qform, factor), shape, taken, notes)
    return checked_affine(_scaled(affine, factor))


def _spacing(facts: Header, notes: list[Note]) -> NDArray[np.float64]:
    """Spacing of ``pixdim``, without signs."""
    spacing = np.array(facts.pixdim[1:4], np.float64)
    if (spacing < 0).any():
        notes.append(noted("MM-IO-077", f"pixdim is {_listed(spacing)}; its absolute values count"))
    return np.abs(spacing)


def _qform(facts: Header, spacing: NDArray[np.float64], notes: list[Note]) -> NDArray[np.float64] | None:
    """The qform as the NIfTI standard defines it, from a quaternion (a, b, c, d) of length 1; None if it is none."""
    vector = np.array(facts.quaternion, np.float64)
    squared = float(vector @ vector)
    if not squared <= 1 + _QUATERNION_SLACK:
        if facts.sform_code > 0:
            notes.append(
                noted("MM-IO-079", f"the quaternion of the qform ({_listed(vector)}) is none; the sform counts")
            )
        return None
    b, c, d = vector / max(1.0, np.sqrt(squared))
    a = np.sqrt(max(0.0, 1 - squared))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    handedness = facts.pixdim[0]
    if handedness not in (-1.0, 1.0):
        notes.append(noted("MM-IO-084", f"pixdim[0] is {handedness:g}, neither 1 nor -1; taken as 1"))
        handedness = 1.0
    qform = np.eye(4)
    qform[:3, :3] = turn * (spacing * [1, 1, handedness])
    qform[:3, 3] = facts.qoffset
    return qform


def _compare_spacing(sform: NDArray[np.float64], spacing: NDArray[np.float64], notes: list[Note]) -> None:
    lengths = np.linalg.norm(sform[:3, :3], axis=0)
    if not np.isfinite(spacing).all() or not spacing.all():
        notes.append(noted("MM-IO-076", f"pixdim is {_listed(spacing)}; the sform's {_listed(lengths)} counts"))
    elif (np.abs(lengths - spacing) > _SAME_SPACING * spacing).any():
        notes.append(
            noted(
                "MM-IO-075", f"the spacing is {_listed(spacing)} in pixdim, {_listed(lengths)} in the sform that counts"
            )
        )


def _compare_forms(
    sform: NDArray[np.float64], qform: NDArray[np.float64], shape: tuple[int, ...], taken: str, notes: list[Note]
) -> None:
    """A note when a corner of the volume lies more than half a voxel away in the other form."""
    apart = corners_apart(sform, qform, shape)
    if not apart <= 0.5 * np.linalg.norm(sform[:3, :3], axis=0).min():
        notes.append(noted("MM-IO-078", f"qform and sform place a corner {apart:.3g} mm apart; the {taken} was taken"))


def _mm_per_unit(affine: NDArray[np.float64], unit: int, notes: list[Note]) -> float:
    factor = _UNITS_MM.get(unit, 1.0)
    if factor == 1.0:
        return 1.0
    spacing = np.linalg.norm(affine[:3, :3], axis=0) * factor
    if _PLAUSIBLE_SPACING_MM[0] <= spacing.min() and spacing.max() <= _PLAUSIBLE_SPACING_MM[1]:
        notes.append(noted("MM-IO-081", f"lengths were not in mm, multiplied by {factor:g}"))
        return factor
    text = f"the unit of length would mean a spacing of {_listed(spacing)} mm; taken as mm instead"
    notes.append(noted("MM-IO-082", text))
    return 1.0


def _scaled(affine: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    return np.diag([factor, factor, factor, 1.0]) @ affine


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _listed(values: Any) -> str:
    return " x ".join(f"{value:g}" for value in values)
