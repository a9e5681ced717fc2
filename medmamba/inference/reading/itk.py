"""From SimpleITK's images to ours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import SimpleITK

from .geometry import affine_from_lps, itk_header
from .image import Image, Note
from .messages import noted, refused
from .payload import checked_payload

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of it we check and say ourselves


def read_meta_or_nrrd(path: Path, *, volume: int | None = None) -> Image:
    """Read one 3D volume from .mha, .mhd, .nrrd or .nhdr.

    Args:
        volume: which of several volumes along the fourth axis, from 0.

    Raises:
        ImageRefused: see ``docs/reference/messages.md``.
        OSError: the file cannot be opened or read.
    """
    payload = checked_payload(path)
    notes = list(payload.notes)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(itk_name(path))
    with refusing():
        reader.ReadImageInformation()
    _refuse_unless_scalar(reader)
    if math.prod(reader.GetSize()) != payload.voxels:  # a field that stands there twice
        text = f"its header can mean {payload.voxels} voxels or {math.prod(reader.GetSize())}; write it anew"
        raise refused("MM-IO-009", text)
    _choose_volume(reader, volume, notes)
    with refusing():
        image = reader.Execute()
    spacing = np.asarray(image.GetSpacing())
    affine = affine_from_lps(np.reshape(image.GetDirection(), (3, 3)) * spacing, np.asarray(image.GetOrigin()))
    kind = "nrrd" if path.suffix.lower() in (".nrrd", ".nhdr") else "meta"
    header = itk_header(kind, image.GetDirection(), image.GetOrigin(), image.GetSpacing())
    return Image(SimpleITK.GetArrayFromImage(image), affine, tuple(notes), header=header)


def itk_name(path: Path) -> str:
    """A path for SimpleITK, which ends the whole process when it is given one that is not UTF-8."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise refused("MM-IO-013", f"its name {path.name!a} is not UTF-8; rename it") from error
    return str(path)


class refusing:
    """Turns an error of SimpleITK within the block into a refusal that keeps its last line, the cause."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise refused("MM-IO-012", f"SimpleITK cannot read it: {lines[-1] if lines else error}") from error


def _refuse_unless_scalar(reader: SimpleITK.ImageFileReader) -> None:
    """Check the kind of voxels; ``reader`` has read the header."""
    kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind:
        raise refused("MM-IO-021", f"voxels are {kind}, not real numbers; save magnitude or phase")
    if reader.GetNumberOfComponents() != 1:
        raise refused("MM-IO-020", f"voxels are {kind}, not real numbers; convert to one scalar channel")


def _choose_volume(reader: SimpleITK.ImageFileReader, volume: int | None, notes: list[Note]) -> None:
    """Let ``reader`` take three axes."""
    size = [int(length) for length in reader.GetSize()]
    if len(size) < 3:
        raise refused("MM-IO-025", f"{len(size)} axes of {size}: a slice or a line, not a volume")
    if len(size) > 4 and max(size[4:]) > 1:
        raise refused("MM-IO-024", f"{len(size)} axes of {size}; split it into 3D files")
    volumes = size[3] if len(size) > 3 else 1
    if volume is None and volumes > 1:
        raise refused(
            "MM-IO-023", f"{volumes} volumes in one file; choose one with --volume 0 to {volumes - 1}, or split it"
        )
    if volume is not None and not 0 <= volume < volumes:
        raise refused("MM-IO-026", f"volume {volume} was asked for, it holds 0 to {volumes - 1}")
    if len(size) == 3:
        return
    if volumes > 1:
        notes.append(noted("MM-IO-085", f"volume {volume} of 0 to {volumes - 1} was taken"))
    else:
        notes.append(noted("MM-IO-072", f"{len(size)} axes of {size}, the last of length 1 and dropped"))
    reader.SetExtractIndex([0, 0, 0, volume or 0, *[0] * (len(size) - 4)])
    reader.SetExtractSize([*size[:3], *[0] * (len(size) - 3)])  # 0: this axis goes away
