"""NIfTI-1 and NIfTI-2 in one file, compressed or not, read from memory after its checksum was verified.

Geometry has one rule: the sform if its code is above 0, else the qform if its code is above 0, else the spacing alone.
nnU-Net's readers disagree about this among themselves; a note says when the other form says something else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from .compressed import GZIP_MAGIC, inflate_gzip
from .image import Image, ImageRefused, checked_affine

#: Extensions between header and data: nobody has more.
_MOST_EXTENSION_BYTES = 64 << 20
_UNITS_MM = {1: 1000.0, 2: 1.0, 3: 0.001}
_PLAUSIBLE_SPACING_MM = (0.01, 50.0)
_SAME_GEOMETRY_MM = 0.05


def read_nifti(path: Path) -> Image:
    """Read one 3D volume.

    Raises:
        ImageRefused: see the codes in ``docs/how-to/pretrain-corpus.md``.
        OSError: the file cannot be opened or read.
    """
    notes: list[str] = []
    with path.open("rb") as stream:
        compressed = stream.read(2) == GZIP_MAGIC
    if compressed != path.name.lower().endswith(".gz"):
        notes.append(f"the file is {'' if compressed else 'not '}compressed, although its name says otherwise")
    header = _header(_head(path, compressed))
    dtype, shape = _dtype_of(header), _shape_of(header, notes)
    start = int(header["vox_offset"]) or header.sizeof_hdr
    expected = int(np.prod(shape)) * dtype.itemsize
    content = (
        inflate_gzip(path, limit=start + expected + _MOST_EXTENSION_BYTES)
        if compressed
        else bytearray(path.read_bytes())
    )
    if len(content) < start + expected:
        raise ImageRefused(
            "truncated",
            f"its header announces {start + expected} bytes, {len(content)} are there; copy or download it again",
        )
    values = np.frombuffer(content, dtype, int(np.prod(shape)), start).reshape(shape[::-1])
    values = values.astype(dtype.newbyteorder("="), copy=False)
    return Image(_rescaled(values, header, notes), _affine_of(header, notes), tuple(notes))


def _head(path: Path, compressed: bool) -> bytes:
    """The first 540 bytes (a NIfTI-2 header), or as many as there are."""
    import gzip
    import zlib

    with path.open("rb") as stream:
        try:
            return (gzip.GzipFile(fileobj=stream) if compressed else stream).read(540)
        except (EOFError, OSError, zlib.error) as error:
            raise ImageRefused("truncated", f"not even the header can be decompressed ({error})") from error


def _header(head: bytes) -> Any:
    if not head:
        raise ImageRefused("empty", "the file is empty; copy or download it again")
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        size = kind.sizeof_hdr
        if len(head) < size:
            continue
        for order in "<>":
            if int.from_bytes(head[:4], "little" if order == "<" else "big") == size:
                header = kind(head[:size], endianness=order, check=False)
                if bytes(header["magic"])[:2] == b"n+":
                    return header
                raise ImageRefused("format", "this is a header without data (.hdr and .img); convert it to .nii.gz")
    raise ImageRefused("format", "this is no NIfTI file, whatever its name says; convert it to .nii.gz")


def _dtype_of(header: Any) -> np.dtype[Any]:
    try:
        dtype = header.get_data_dtype()
    except Exception as error:  # nibabel raises its own errors for codes it does not know
        raise ImageRefused("voxel-type", f"unknown data type {int(header['datatype'])}; convert to int16") from error
    if dtype.fields is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        name = "colours" if dtype.fields is not None else str(dtype)
        raise ImageRefused("voxel-type", f"voxels are {name}, not real numbers; convert to one scalar channel")
    return np.dtype(dtype)


def _shape_of(header: Any, notes: list[str]) -> tuple[int, int, int]:
    """(x, y, z)."""
    count = int(header["dim"][0])
    dims = [int(size) for size in header["dim"][1 : count + 1]] if 1 <= count <= 7 else []
    if not dims or min(dims) < 1:
        raise ImageRefused("format", f"the header announces axes of {list(map(int, header['dim']))}; write it anew")
    if len(dims) > 3 and max(dims[3:]) == 1:
        notes.append(f"{len(dims)} axes, those after the third of length 1, read as three")
        dims = dims[:3]
    if len(dims) > 3:
        raise ImageRefused("not-3d", f"{len(dims)} axes of {dims}: a series of volumes; split it into 3D files")
    if len(dims) < 3:
        raise ImageRefused("not-3d", f"{len(dims)} axes of {dims}: a slice or a line, not a volume")
    return dims[0], dims[1], dims[2]


def _rescaled(values: NDArray[Any], header: Any, notes: list[str]) -> NDArray[Any]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return values  # as the standard has it: no scaling
    if not np.isfinite(intercept):
        notes.append(f"scl_inter is {intercept}, read as 0")
        intercept = 0.0
    if (slope, intercept) == (1.0, 0.0):
        return values
    return values.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _affine_of(header: Any, notes: list[str]) -> NDArray[np.float64]:
    qform = _qform(header) if header["qform_code"] > 0 else None
    if header["sform_code"] > 0:
        affine = np.asarray(header.get_sform(), np.float64)
        if qform is not None and not _agree(affine, qform, header.get_data_shape()):
            notes.append("qform and sform place the volume differently; the sform was taken")
    elif qform is not None:
        affine = qform
    else:
        spacing = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
        affine = np.diag([*spacing, 1.0])
        notes.append("neither qform nor sform is set: the orientation is unknown, taken as right, anterior, superior")
    return checked_affine(_in_mm(affine, int(header["xyzt_units"]) & 7, notes))


def _qform(header: Any) -> NDArray[np.float64] | None:
    try:
        return np.asarray(header.get_qform(), np.float64)
    except Exception:  # a quaternion that is none: nibabel raises errors of several kinds
        return None


def _agree(first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    """Whether two affines place the corners of a volume within ``_SAME_GEOMETRY_MM`` per voxel of its longest axis."""
    return bool(np.abs((first - second)[:3, :3]).max() < _SAME_GEOMETRY_MM) and bool(
        np.abs((first - second)[:3, 3]).max() < _SAME_GEOMETRY_MM * max(shape)
    )


def _in_mm(affine: NDArray[np.float64], unit: int, notes: list[str]) -> NDArray[np.float64]:
    factor = _UNITS_MM.get(unit, 1.0)
    if factor == 1.0:
        return affine
    scaled = affine.copy()
    scaled[:3] *= factor
    spacing = np.linalg.norm(scaled[:3, :3], axis=0)
    if _PLAUSIBLE_SPACING_MM[0] <= spacing.min() and spacing.max() <= _PLAUSIBLE_SPACING_MM[1]:
        notes.append(f"lengths were not in mm, multiplied by {factor:g}")
        return scaled
    notes.append(f"the unit of length would mean a spacing of {spacing.max():g} mm; taken as mm instead")
    return affine
