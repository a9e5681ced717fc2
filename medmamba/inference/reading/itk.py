"""From SimpleITK's images to ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from .image import Image, ImageRefused, checked_affine
from .payload import check_payload

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of it we check and say ourselves

#: SimpleITK's axes point left and posterior, ours right and anterior.
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_meta_or_nrrd(path: Path) -> Image:
    """Read one 3D volume from .mha, .mhd, .nrrd or .nhdr.

    Raises:
        ImageRefused: see the codes in ``docs/how-to/pretrain-corpus.md``.
        OSError: the file cannot be opened or read.
    """
    check_payload(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    with refusing():
        reader.ReadImageInformation()
    refuse_unless_scalar_3d(reader)
    with refusing():
        image = reader.Execute()
    return from_itk(image)


class refusing:
    """Turns an error of SimpleITK within the block into a refusal that keeps its last line, the cause."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ImageRefused("unreadable", f"SimpleITK cannot read it: {lines[-1] if lines else error}") from error


def refuse_unless_scalar_3d(reader: SimpleITK.ImageFileReader) -> None:
    """Check number of axes and kind of voxels; ``reader`` has read the header."""
    size = list(reader.GetSize())
    if reader.GetNumberOfComponents() != 1 or "complex" in SimpleITK.GetPixelIDValueAsString(reader.GetPixelID()):
        kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
        raise ImageRefused("voxel-type", f"voxels are {kind}, not real numbers; convert to one scalar channel")
    if len(size) != 3:
        what = "a series of volumes; split it into 3D files" if len(size) > 3 else "a slice or a line, not a volume"
        raise ImageRefused("not-3d", f"{len(size)} axes of {size}: {what}")


def from_itk(image: SimpleITK.Image) -> Image:
    """An image of SimpleITK with three axes as ours."""
    affine = affine_of(
        np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing()), np.asarray(image.GetOrigin())
    )
    return Image(SimpleITK.GetArrayFromImage(image), affine)


def affine_of(steps_lps: NDArray[np.float64], origin_lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) to right, anterior, superior; from steps per voxel (columns of (3, 3)) and origin in SimpleITK's axes."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps_lps, origin_lps
    return checked_affine(_TO_RAS @ affine)
