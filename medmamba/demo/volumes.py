"""Reading volumes for scores and pictures. Arrays are (D, H, W), that is z, y, x of the file."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray


@dataclass(frozen=True)
class Volume:
    """A volume and its voxel size.

    Attributes:
        array: (D, H, W), the type of the file.
        spacing_mm: voxel size along D, H, W.
    """

    array: NDArray[np.generic]
    spacing_mm: tuple[float, float, float]


def read_volume(path: Path, *, oriented: bool = False) -> Volume:
    """Read one 3D file.

    Args:
        path: NIfTI, MHA or NRRD.
        oriented: turn the array so that D runs to the head, H to the back and W to the patient's left (the
            nearest such order of axes; nothing is resampled).

    Raises:
        ValueError: not a 3D volume with one value per voxel.
        RuntimeError: the file cannot be read (SimpleITK's message).
    """
    image = SimpleITK.ReadImage(str(path))
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{path.name} has size {image.GetSize()}; expected 3 axes and one value per voxel")
    if oriented:
        image = SimpleITK.DICOMOrient(image, "LPS")
    x, y, z = image.GetSpacing()
    return Volume(SimpleITK.GetArrayFromImage(image), (z, y, x))


def check_nifti(path: Path) -> None:
    """Look for damage that SimpleITK, and with it nnU-Net, reads over in silence.

    It fills the missing part of a truncated file with zeros, ignores the checksum of a compressed one, and turns NaN
    and infinity into 0.

    Raises:
        ValueError: the file is truncated or damaged, or holds NaN or infinity.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                # The checksum is compared at the end of the stream.
                while stream.read(1 << 20):
                    pass
        values = np.asanyarray(nibabel.load(path).dataobj)
    except (OSError, EOFError, zlib.error, ImageFileError) as error:
        raise ValueError(f"{path.name} is damaged or truncated ({error})") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{path.name} holds NaN or infinity")
