"""The reader for a path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from .geometry import notes_on_shear
from .image import Image
from .messages import refused

READABLE_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")


def read_image(path: str | Path, *, volume: int | None = None, prefer: Literal["sform", "qform"] = "sform") -> Image:
    """Read one 3D image file, or the DICOM series of a folder, to its last byte.

    Args:
        volume: which volume of a file with several, from 0; None refuses such files.
        prefer: which form of a NIfTI counts where both are set.

    Raises:
        ImageRefused: damaged or no scalar 3D image; the text says why and what to do.
        OSError: it cannot be opened or read (missing, no permission).
    """
    path = Path(path)
    if path.is_dir():
        image = read_dicom_folder(path)
    elif path.exists() and not path.is_file():
        raise refused("MM-IO-002", "a pipe, a socket or a device, not a file; give the path of a file")
    else:
        image = _read_file(path, volume, prefer)
    return replace(image, notes=image.notes + notes_on_shear(image))


def read_dicom_folder(folder: Path) -> Image:
    """See :func:`medmamba.inference.reading.dicom.read_dicom_folder`."""
    from . import dicom

    return dicom.read_dicom_folder(folder)


def _read_file(path: Path, volume: int | None, prefer: str) -> Image:
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        from .nifti import read_nifti

        return read_nifti(path, volume=volume, prefer=prefer)
    if name.endswith(READABLE_SUFFIXES):
        from .itk import read_meta_or_nrrd

        return read_meta_or_nrrd(path, volume=volume)
    raise refused("MM-IO-007", f"only {', '.join(READABLE_SUFFIXES)} and DICOM folders are read; convert it")
