"""NIfTI-1 and NIfTI-2 in one file, compressed or not, read from memory after its checksum was verified."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from .compressed import GZIP_MAGIC, MOST_INFLATION, inflate
from .image import Image, Note
from .messages import noted, refused
from .nifti_geometry import header_facts, place
from .recognise import recognised

#: Extensions between header and data: nobody has more.
_MOST_EXTENSION_BYTES = 64 << 20


@dataclass(frozen=True)
class _Layout:
    """Where the voxels of one volume are among the bytes of a file.

    Attributes:
        shape: (x, y, z).
        dtype: with the byte order of the file.
        start: first byte of the volume.
        end: byte after the last volume of the file.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    start: int
    end: int


def read_nifti(path: Path, *, volume: int | None = None, prefer: str = "sform") -> Image:
    """Read one 3D volume.

    Args:
        volume: which of several volumes along the fourth axis, from 0.
        prefer: "sform" or "qform"; which one counts where both are set.

    Raises:
        ImageRefused: see ``docs/reference/messages.md``.
        OSError: the file cannot be opened or read.
    """
    notes: list[Note] = []
    with path.open("rb") as stream:
        compressed = stream.read(2) == GZIP_MAGIC
    if compressed != path.name.lower().endswith(".gz"):
        is_or_not = "" if compressed else "not "
        notes.append(noted("MM-IO-070", f"the file is {is_or_not}compressed, although its name says otherwise"))
    header = _header(_head(path, compressed))
    layout = _layout(header, volume, notes)
    content = _content(path, compressed, layout, notes)
    count = int(np.prod(layout.shape))
    values = np.frombuffer(content, layout.dtype, count, layout.start).reshape(layout.shape[::-1])
    # A view of one volume would keep all others in memory.
    values = values.astype(layout.dtype.newbyteorder("="), copy=volume is not None)
    affine = place(header, layout.shape, prefer, notes)
    return Image(_rescaled(values, header, notes), affine, tuple(notes), header=header_facts(header))


def _head(path: Path, compressed: bool) -> bytes:
    """The first 540 bytes (a NIfTI-2 header), or as many as there are."""
    with path.open("rb") as stream:
        try:
            return (gzip.GzipFile(fileobj=stream) if compressed else stream).read(540)
        except EOFError as error:
            raise refused("MM-IO-004", f"not even the header can be decompressed ({error})") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise refused("MM-IO-005", f"the compressed data are damaged from the start ({error})") from error


def _header(head: bytes) -> Any:
    if not head:
        raise refused("MM-IO-003", "the file is empty; copy or download it again")
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        size = kind.sizeof_hdr
        if len(head) < size:
            continue
        for order in "<>":
            if int.from_bytes(head[:4], "little" if order == "<" else "big") == size:
                header = kind(head[:size], endianness=order, check=False)
                if bytes(header["magic"])[:2] == b"n+":
                    return header
                raise refused("MM-IO-010", "this is a header without data (.hdr and .img); convert it to .nii.gz")
    raise refused("MM-IO-008", f"this is {recognised(head)}, whatever its name says; rename or convert it to .nii.gz")


def _layout(header: Any, volume: int | None, notes: list[Note]) -> _Layout:
    dtype = _dtype_of(header)
    shape, volumes = _shape_of(header, notes)
    offset = float(header["vox_offset"])
    if not (offset == 0 or header.sizeof_hdr <= offset <= header.sizeof_hdr + _MOST_EXTENSION_BYTES):
        raise refused("MM-IO-009", f"the header says that voxels begin at byte {offset:g}; write it anew")
    first = int(offset) or int(header.sizeof_hdr)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if volume is None and volumes > 1:
        raise refused(
            "MM-IO-023", f"{volumes} volumes in one file; choose one with --volume 0 to {volumes - 1}, or split it"
        )
    if volume is not None and not 0 <= volume < volumes:
        raise refused("MM-IO-026", f"volume {volume} was asked for, it holds 0 to {volumes - 1}")
    if volumes > 1:
        notes.append(noted("MM-IO-085", f"volume {volume} of 0 to {volumes - 1} was taken"))
    return _Layout(shape, dtype, first + (volume or 0) * size, first + volumes * size)


def _dtype_of(header: Any) -> np.dtype[Any]:
    try:
        dtype = np.dtype(header.get_data_dtype())
    except Exception as error:  # nibabel raises its own errors for codes it does not know
        text = f"unknown data type {int(header['datatype'])}; convert to int16"
        raise refused("MM-IO-022", text) from error
    if dtype.fields is not None:
        raise refused("MM-IO-020", "voxels are colours, not real numbers; convert to one scalar channel")
    if dtype.kind == "c":
        raise refused("MM-IO-021", f"voxels are {dtype}, not real numbers; save magnitude or phase")
    if dtype.kind not in "iuf" or dtype.itemsize not in (1, 2, 4, 8):
        raise refused("MM-IO-022", f"voxels are {dtype}; convert to int16 or float32")
    return dtype


def _shape_of(header: Any, notes: list[Note]) -> tuple[tuple[int, int, int], int]:
    """(x, y, z), and the number of volumes."""
    count = int(header["dim"][0])
    dims = [int(size) for size in header["dim"][1 : count + 1]] if 1 <= count <= 7 else []
    if not dims or min(dims) < 1:
        raise refused("MM-IO-009", f"the header announces axes of {list(map(int, header['dim']))}; write it anew")
    if len(dims) < 3:
        raise refused("MM-IO-025", f"{len(dims)} axes of {dims}: a slice or a line, not a volume")
    if len(dims) > 4 and max(dims[4:]) > 1:
        raise refused("MM-IO-024", f"{len(dims)} axes of {dims}; split it into 3D files")
    volumes = dims[3] if len(dims) > 3 else 1
    if len(dims) > 4 or (len(dims) == 4 and volumes == 1):
        notes.append(noted("MM-IO-072", f"{len(dims)} axes of {dims}, the last of length 1 and dropped"))
    return (dims[0], dims[1], dims[2]), volumes


def _content(path: Path, compressed: bool, layout: _Layout, notes: list[Note]) -> bytearray:
    """The whole file, decompressed."""
    stored = path.stat().st_size
    if layout.end > (stored * MOST_INFLATION if compressed else stored):
        what = f"{stored} bytes, compressed," if compressed else f"{stored}"
        raise refused(
            "MM-IO-004", f"its header announces {layout.end} bytes, {what} are there; copy or download it again"
        )
    if not compressed:
        content = bytearray(stored)
        with path.open("rb") as stream:
            del content[stream.readinto(content) :]
        trailing = len(content) - layout.end
    else:
        inflated = inflate(path, "gzip", limit=layout.end + _MOST_EXTENSION_BYTES)
        content, trailing = inflated.content, inflated.trailing or inflated.length - layout.end
    if len(content) < layout.end:
        raise refused(
            "MM-IO-004", f"its header announces {layout.end} bytes, {len(content)} are there; copy or download it again"
        )
    if trailing > 0:
        notes.append(noted("MM-IO-071", f"{trailing} bytes follow the last voxel"))
    return content


def _rescaled(values: NDArray[Any], header: Any, notes: list[Note]) -> NDArray[Any]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):  # as the standard has it: no scaling
        notes.append(noted("MM-IO-073", f"scl_slope is {slope:g}: nothing was rescaled"))
        return values
    if not np.isfinite(intercept):
        notes.append(noted("MM-IO-074", f"scl_inter is {intercept}, read as 0"))
        intercept = 0.0
    if (slope, intercept) == (1.0, 0.0):
        return values
    # Wide types hold what float32 cannot; nothing may become infinite here and be taken for a damaged voxel later.
    wide = np.dtype(np.float64 if values.dtype.itemsize > 4 or max(abs(slope), abs(intercept)) > 1e6 else np.float32)
    rescaled: NDArray[Any] = values.astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        rescaled *= slope
        rescaled += intercept
    return rescaled
