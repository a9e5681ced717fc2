"""Writing a segmentation so that its final name is a promise, and checking the promise later."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.files import sha256_of, write_atomically
from medmamba.inference.reading import Image, ImageRefused, read_image

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_MOST_LABEL = 2**16 - 1
_SAME_MM = 1e-3


class WriteFailed(Exception):
    """A segmentation that has no file now: why, and what to do about it.

    Args:
        code: "disk-full", "not-written", "not-equal" (it does not read back as what was meant) or "labels".
        text: one sentence with the cause and the remedy; without the path.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


@dataclass(frozen=True)
class _Format:
    write: Callable[[str, NDArray[Any], Image, Mapping[int, str]], None]
    read: Callable[[Path], Image]


def _formats() -> dict[str, _Format]:
    """Loaded on first use: nibabel and SimpleITK take a while."""
    from medmamba.inference.reading.nifti import read_nifti

    from .itk import read_meta, read_nrrd, write_meta, write_nrrd
    from .nifti import write_compressed_nifti, write_nifti

    return {
        ".nii.gz": _Format(write_compressed_nifti, read_nifti),
        ".nii": _Format(write_nifti, read_nifti),
        ".mha": _Format(write_meta, read_meta),
        ".nrrd": _Format(write_nrrd, read_nrrd),
    }


WRITABLE_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")


def suffix_of(path: str | os.PathLike[str]) -> str | None:
    """The one of ``WRITABLE_SUFFIXES`` that a name ends with, in any case; None when there is none."""
    name = Path(path).name.lower()
    return next((suffix for suffix in WRITABLE_SUFFIXES if name.endswith(suffix)), None)


def write_segmentation(
    path: str | os.PathLike[str], labels: NDArray[Any], like: Image, names: Mapping[int, str]
) -> str:
    """Write labels on the grid of their image; ``path`` appears when it read back equal, and not before.

    The file is uint8, or uint16 where a label or a name is above 255. Its bytes depend on the arguments alone. A NIfTI
    like a NIfTI has the same sform, qform, codes, pixdim and units, bit for bit.

    Args:
        path: ends with one of ``WRITABLE_SUFFIXES``; what is there is replaced.
        labels: (D, H, W), whole numbers from 0 to 65535, in the order of ``like.values``.
        like: the image; its voxels are not used.
        names: what the labels mean.

    Returns:
        SHA-256 of the file, 64 hexadecimal digits.

    Raises:
        WriteFailed: labels that cannot be written, no room on the disk, or a file that reads back as something else.
            Nothing of it is left, and what was at ``path`` is still there.
        ValueError: the suffix says no format.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if suffix is None:
        raise ValueError(f"{path.name} ends with none of {', '.join(WRITABLE_SUFFIXES)}")
    voxels = _checked_labels(labels, like, names)
    kind = _formats()[suffix]
    digests: list[str] = []

    def check(temporary: str) -> None:
        _forget(temporary)
        _compare(kind.read, Path(temporary), voxels, like, suffix)
        digests.append(sha256_of(temporary))

    try:
        write_atomically(path, lambda temporary: kind.write(temporary, voxels, like, names), check)
    except OSError as error:
        raise _failure(error) from error
    return digests[0]


def verify_segmentation(path: str | os.PathLike[str], sha256: str, like: Image | None = None) -> str | None:
    """Why a file is not what :func:`write_segmentation` left; None when it is.

    Args:
        sha256: what was returned when it was written.
        like: the image, to compare the grids as well: for files that came from somewhere else.
    """
    path = Path(path)
    try:
        found = sha256_of(path)
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:
        return f"the file cannot be read ({error.strerror})"
    if found != sha256:
        return f"its content has changed since it was written (SHA-256 {found[:8]}... instead of {sha256[:8]}...)"
    if like is None:
        return None
    try:
        return _other_grid(read_image(path), like)
    except ImageRefused as error:
        return error.text


def _checked_labels(labels: NDArray[Any], like: Image, names: Mapping[int, str]) -> NDArray[Any]:
    """Labels as uint8 or uint16; the names count too, so that all cases of a model have one type."""
    if labels.shape != like.values.shape:
        raise WriteFailed("labels", f"labels are {labels.shape}, the image is {like.values.shape}; report this")
    if labels.dtype.kind not in "iu":
        raise WriteFailed("labels", f"labels are {labels.dtype}, not whole numbers; report this")
    least, most = int(labels.min(initial=0)), max(int(labels.max(initial=0)), *names, 0)
    if least < 0 or most > _MOST_LABEL:
        raise WriteFailed("labels", f"labels from {least} to {most} do not fit 0 to {_MOST_LABEL}; report this")
    for value, name in names.items():
        if not name.isprintable():
            raise WriteFailed("labels", f"the name {name!r} of label {value} cannot be written; rename it in the model")
    return labels.astype(np.uint8 if most < 256 else np.uint16, copy=False)


def _compare(read: Callable[[Path], Image], path: Path, labels: NDArray[Any], like: Image, suffix: str) -> None:
    try:
        back = read(path)
    except (ImageRefused, RuntimeError) as error:
        raise WriteFailed("not-equal", f"it cannot be read back ({error}); check the disk and try again") from error
    # Plane by plane: of whole volumes, the comparison would be a third one in memory.
    if back.values.dtype != labels.dtype or not all(map(np.array_equal, back.values, labels)):
        raise WriteFailed("not-equal", "it reads back with other labels; check disk and memory and try again")
    if suffix.startswith(".nii") and like.header.kind == "nifti":
        # As text, because NaN is equal to nothing, and a file may hold it.
        same = repr(back.header) == repr(like.header)
    else:
        same = _other_grid(back, like) is None
    if not same:
        raise WriteFailed("not-equal", "it reads back with another geometry; report this with the header of the image")


def _other_grid(found: Image, like: Image) -> str | None:
    """How two grids differ by more than the rounding of float32; None when they do not."""
    if found.values.shape != like.values.shape:
        return f"it has {found.values.shape} voxels, the image {like.values.shape}"
    corners = np.array([[*corner, 1] for corner in product(*((0, size - 1) for size in like.values.shape[::-1]))]).T
    away = float(np.abs((found.affine - like.affine) @ corners)[:3].max())
    scale = float(np.abs(like.affine @ corners).max())
    return f"it lies {away:g} mm away from the image" if away > max(_SAME_MM, 1e-6 * scale) else None


def _forget(path: str) -> None:
    """Ask the system to drop its copy of a file, so that reading back means reading the disk."""
    if hasattr(os, "posix_fadvise"):
        with Path(path).open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _failure(error: OSError) -> WriteFailed:
    if error.errno in _NO_ROOM:
        return WriteFailed("disk-full", "the disk is full; make room and start the same command again")
    if error.errno == errno.EFBIG:
        return WriteFailed("not-written", "the file is larger than the system allows (ulimit -f); raise the limit")
    return WriteFailed("not-written", f"{error.strerror or error}; check the output folder and try again")
