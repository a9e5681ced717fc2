"""What a reader returns, and what it raises."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Matrix = tuple[tuple[float, ...], ...]


class ImageRefused(Exception):
    """An image that must not be used: why, and what to do about it.

    Args:
        code: short and stable, e.g. "truncated"; for tables and tests.
        text: one sentence with what is wrong, the numbers, and the remedy; without the path.
        id: of the catalogue (:mod:`medmamba.inference.reading.messages`), e.g. "MM-IO-004"; empty outside of it.
    """

    def __init__(self, code: str, text: str, id: str = "") -> None:
        super().__init__(code, text, id)  # all, so that it survives the way back from another process
        self.code = code
        self.text = text
        self.id = id

    def __str__(self) -> str:
        return f"{self.id} {self.code}: {self.text}".lstrip()


@dataclass(frozen=True)
class Note:
    """What was odd but not wrong.

    Attributes:
        id: of the catalogue, e.g. "MM-IO-078".
        text: one sentence with the numbers; without the path.
    """

    id: str
    text: str

    def __str__(self) -> str:
        return f"{self.id}: {self.text}"


@dataclass(frozen=True)
class Header:
    """What a file says about its geometry, as it stands there: for a writer that gives the same back.

    Which of it counts is decided once, in :attr:`Image.affine`; lengths here are in the unit of the file. Numbers are
    those of the file to the last bit, also where they are NaN or contradict each other.

    Attributes:
        kind: "nifti", "meta", "nrrd" or "dicom"; "array" for an image that was made in memory.
        version: of NIfTI, 1 or 2; 0 elsewhere, where the next seven are empty or 0 as well.
        pixdim: eight numbers.
        xyzt_units: units of length (& 7) and time.
        sform_code, qform_code: 0 where the form is not set.
        sform: rows of (3, 4), x y z of the file to right, anterior, superior.
        quaternion: b, c, d of the qform.
        qoffset: x, y, z of the qform.
        direction: nine numbers, row by row, as SimpleITK gives them (left, posterior, superior); empty for NIfTI, as
            are the last two.
        origin: x, y, z in mm.
        spacing: of x, y, z in mm.
    """

    kind: str = "array"
    version: int = 0
    pixdim: tuple[float, ...] = ()
    xyzt_units: int = 0
    sform_code: int = 0
    qform_code: int = 0
    sform: Matrix = ()
    quaternion: tuple[float, ...] = ()
    qoffset: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()
    origin: tuple[float, ...] = ()
    spacing: tuple[float, ...] = ()


@dataclass(frozen=True)
class Image:
    """One scalar volume as it lies in its file, with where it lies in the patient.

    Attributes:
        values: (D, H, W), the file's x axis last; any real dtype, rescaled to the file's units (HU for CT).
        affine: (4, 4) float64; voxel index (w, h, d), i.e. (x, y, z) of the file, to mm along right, anterior,
            superior.
        notes: what was odd but not wrong.
        tags: what the file says about itself, as text: "modality" and "patient" of DICOM.
        header: its geometry as it stands in the file.
    """

    values: NDArray[np.generic]
    affine: NDArray[np.float64]
    notes: tuple[Note, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    header: Header = field(default_factory=Header)

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
