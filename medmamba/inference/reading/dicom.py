"""One DICOM series in a folder: slices sorted by position, with no hole between them.

SimpleITK reads a series with a missing slice without a word and widens the spacing of all others. Here the positions
decide: neighbouring slices must be equally far apart, within a hundredth of their distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from .geometry import affine_from_lps, itk_header
from .image import Image
from .itk import itk_name, refusing
from .messages import refused

_POSITION, _ORIENTATION, _SPACING = "0020|0032", "0020|0037", "0028|0030"
_MODALITY, _PATIENT, _IMAGE_TYPE = "0008|0060", "0010|0020", "0008|0008"
_SAME_STEP = 0.01
_SAME_TAG = 1e-4  # the same numbers are written with more or fewer digits
_SUFFIXES = (".dcm", ".ima", ".dicom")
_SOP_CLASS = b"\x02\x00\x02\x00UI"  # tag and type of the field that says what kind of object a file holds


@dataclass(frozen=True)
class _Slice:
    path: str
    position: NDArray[np.float64]
    tags: dict[str, str]


def read_dicom_folder(folder: Path) -> Image:
    """Read the one image series of a folder (not of the folders below it).

    Raises:
        ImageRefused: see ``docs/reference/messages.md``.
        OSError: the folder cannot be read.
    """
    for path in folder.iterdir():  # raises where SimpleITK would read an unreadable folder as an empty one
        itk_name(path)
    slices = [_read_header(path) for path in _files_of_the_series(folder)]
    slices = [found for found in slices if "LOCALIZER" not in found.tags.get(_IMAGE_TYPE, "").upper()]
    if len(slices) < 2:
        raise refused("MM-IO-042", f"{len(slices)} slices that are no localizer; a volume needs at least two")
    row, column = _orientation(slices)
    normal = np.cross(row, column)
    slices.sort(key=lambda found: float(found.position @ normal))
    step = _step([found.position for found in slices], normal)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([found.path for found in slices])
    with refusing():
        image = reader.Execute()
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise refused("MM-IO-020", "slices are colour pictures, not real numbers; export the scalar series")
    spacing_x, spacing_y, _ = image.GetSpacing()
    steps = np.stack([row * spacing_x, column * spacing_y, step], axis=1)
    tags = {"modality": slices[0].tags.get(_MODALITY, ""), "patient": slices[0].tags.get(_PATIENT, "")}
    spacing = np.linalg.norm(steps, axis=0)
    header = itk_header("dicom", (steps / spacing).ravel(), slices[0].position, spacing)
    affine = affine_from_lps(steps, slices[0].position)
    return Image(SimpleITK.GetArrayFromImage(image), affine, tags=tags, header=header)


def _files_of_the_series(folder: Path) -> Sequence[str]:
    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise refused("MM-IO-040", "no file of this folder is a DICOM image (structures and reports are none)")
    if len(series) > 1:
        raise refused("MM-IO-041", f"{len(series)} series in one folder; give each a folder of its own")
    names: Sequence[str] = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    _refuse_damaged_slices(folder, names)
    return names


def _refuse_damaged_slices(folder: Path, names: Sequence[str]) -> None:
    """SimpleITK leaves a slice that it cannot read out of the series: at an end, nothing else would show that."""
    kind = _sop_class(Path(names[0]))
    for path in sorted(set(folder.iterdir()) - {Path(name) for name in names}):
        if not path.is_file() or path.name.startswith("."):
            continue
        other = _sop_class(path)
        # Of another kind are structures, doses, reports: they may lie beside their series.
        if (other == kind and kind) or (not other and path.name.lower().endswith(_SUFFIXES)):
            raise refused("MM-IO-046", f"{path.name} cannot be read; copy or download the series again")


def _sop_class(path: Path) -> bytes:
    """What kind of object a DICOM file holds; empty where it does not say so."""
    with path.open("rb") as stream:
        _, found, rest = stream.read(1024).partition(_SOP_CLASS)
    return rest[2 : 2 + int.from_bytes(rest[:2], "little")].rstrip(b"\0") if found else b""


def _read_header(path: str) -> _Slice:
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(path)
    reader.LoadPrivateTagsOff()
    with refusing():
        reader.ReadImageInformation()
    tags = {
        key: reader.GetMetaData(key).strip()
        for key in (_POSITION, _ORIENTATION, _SPACING, _MODALITY, _PATIENT, _IMAGE_TYPE)
        if reader.HasMetaDataKey(key)
    }
    try:
        position = np.array([float(value) for value in tags[_POSITION].split("\\")])
    except (KeyError, ValueError) as error:
        raise refused("MM-IO-047", f"slice {Path(path).name} has no position; export it again") from error
    return _Slice(path, position, tags)


def _orientation(slices: Sequence[_Slice]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions of rows and columns, equal in all slices."""
    for key, what in ((_ORIENTATION, "orientations"), (_SPACING, "pixel spacings")):
        found = [_numbers(item.tags.get(key, "")) for item in slices]
        if len({len(numbers) for numbers in found}) > 1 or np.ptp(found, axis=0).max(initial=0) > _SAME_TAG:
            raise refused("MM-IO-047", f"slices have different {what}; split the series")
    cosines = _numbers(slices[0].tags.get(_ORIENTATION, ""))
    if len(cosines) != 6:
        raise refused("MM-IO-047", "slices have no orientation; export the series again")
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    return row / np.linalg.norm(row), column / np.linalg.norm(column)


def _numbers(text: str) -> list[float]:
    try:
        return [float(value) for value in text.split("\\")] if text else []
    except ValueError as error:
        raise refused("MM-IO-047", f"a slice has {text!r} in place of numbers; export the series again") from error


def _step(positions: Sequence[NDArray[np.float64]], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean vector from one slice to the next, when all are equal."""
    steps = np.diff(np.stack(positions), axis=0)
    lengths = steps @ normal
    usual = float(np.median(lengths))
    if lengths.min() <= _SAME_STEP * abs(usual):
        raise refused("MM-IO-044", f"two slices lie {lengths.min():g} mm apart; remove the copy")
    if lengths.max() > 1.5 * usual:
        k = int(lengths.argmax())
        raise refused(
            "MM-IO-043",
            f"{lengths[k]:g} mm between slices {k + 1} and {k + 2}, {usual:g} mm elsewhere; fetch the missing ones",
        )
    if np.abs(steps - steps.mean(axis=0)).max() > _SAME_STEP * usual:
        raise refused(
            "MM-IO-045", f"slices lie {lengths.min():g} to {lengths.max():g} mm apart; resample them evenly first"
        )
    mean: NDArray[np.float64] = steps.mean(axis=0)
    return mean
