"""The reader for a path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .image import Image, ImageRefused

READABLE_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")


def read_image(path: str | Path) -> Image:
    """Read one 3D image file, or the DICOM series of a folder, to its last byte.

    Raises:
        ImageRefused: damaged or no scalar 3D image; the text says why and what to do.
        OSError: it cannot be opened or read (missing, no permission).
    """
    path = Path(path)
    if path.is_dir():
        return read_dicom_folder(path)
    return _reader_for(path.name)(path)


def read_dicom_folder(folder: Path) -> Image:
    """See :func:`medmamba.inference.reading.dicom.read_dicom_folder`."""
    from . import dicom

    return dicom.read_dicom_folder(folder)


def _reader_for(name: str) -> Callable[[Path], Image]:
    name = name.lower()
    if name.endswith((".nii", ".nii.gz")):
        from .nifti import read_nifti

        return read_nifti
    if name.endswith(READABLE_SUFFIXES):
        from .itk import read_meta_or_nrrd

        return read_meta_or_nrrd
    raise ImageRefused("format", f"only {', '.join(READABLE_SUFFIXES)} and DICOM folders are read; convert it")
