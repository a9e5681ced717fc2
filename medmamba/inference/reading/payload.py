"""MetaImage and NRRD: that the data are complete and undamaged, before SimpleITK reads them.

Both formats have a text header that says where the data begin, how they are compressed and how long they are.
"""

from __future__ import annotations

import bz2
import math
from dataclasses import dataclass
from pathlib import Path

from .compressed import inflate_gzip, inflate_zlib
from .image import ImageRefused

_MOST_HEADER_BYTES = 1 << 20
_META_TYPES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
_NRRD_SIZES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), 8),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), 8),
    "float": 4,
    "double": 8,
}


@dataclass(frozen=True)
class Payload:
    """Where the voxels of an image are: their file, first byte, compression ("", "gzip", "zlib", "bzip2"), length."""

    path: Path
    offset: int
    compression: str
    length: int


def check_payload(path: Path) -> None:
    """Read the voxels of a .mha, .mhd, .nrrd or .nhdr to the end.

    Raises:
        ImageRefused: "empty", "format", "truncated" or "checksum".
        OSError: a file cannot be read.
    """
    with path.open("rb") as stream:
        head = stream.read(_MOST_HEADER_BYTES)
    if not head:
        raise ImageRefused("empty", "the file is empty; copy or download it again")
    payload = _nrrd_payload(path, head) if path.suffix.lower() in (".nrrd", ".nhdr") else _meta_payload(path, head)
    if payload.compression == "gzip":
        found = len(inflate_gzip(payload.path, offset=payload.offset, limit=payload.length))
    elif payload.compression == "zlib":
        found = len(inflate_zlib(payload.path, offset=payload.offset, limit=payload.length))
    elif payload.compression == "bzip2":
        found = _bzip2_length(payload)
    else:
        found = payload.path.stat().st_size - max(payload.offset, 0)
    if found < payload.length:
        raise ImageRefused(
            "truncated", f"its header announces {payload.length} bytes of voxels, {found} are there; copy it again"
        )


def _bzip2_length(payload: Payload) -> int:
    with payload.path.open("rb") as stream:
        stream.seek(payload.offset)
        try:
            return len(bz2.decompress(stream.read()))
        except (ValueError, OSError) as error:
            raise ImageRefused("checksum", f"the compressed data are damaged ({error}); copy it again") from error


def _meta_payload(path: Path, head: bytes) -> Payload:
    fields: dict[str, str] = {}
    offset = 0
    for line in head.splitlines(keepends=True):
        offset += len(line)
        name, separator, value = line.decode("latin-1").partition("=")
        if not separator:
            break
        fields[name.strip().lower()] = value.strip()
        if name.strip().lower() == "elementdatafile":
            break
    try:
        dims = [int(size) for size in fields["dimsize"].split()]
        kind = fields["elementtype"].upper().removeprefix("MET_").removeprefix("U").removesuffix("_ARRAY")
        channels = int(fields.get("elementnumberofchannels", "1"))
        length = math.prod(dims) * channels * _META_TYPES[kind]
        target = fields["elementdatafile"]
    except (KeyError, ValueError) as error:
        raise ImageRefused("format", f"no MetaImage header that we understand ({error}); convert to .nii.gz") from error
    compression = "zlib" if fields.get("compresseddata", "False").lower() == "true" else ""
    if target.upper() == "LOCAL":
        return Payload(path, offset, compression, length)
    return Payload(_companion(path, target), max(int(fields.get("headersize", "0")), 0), compression, length)


def _nrrd_payload(path: Path, head: bytes) -> Payload:
    if not head.startswith(b"NRRD"):
        raise ImageRefused("format", "this is no NRRD file, whatever its name says; convert it to .nii.gz")
    fields: dict[str, str] = {}
    offset = 0
    for line in head.split(b"\n"):
        offset += len(line) + 1
        text = line.decode("latin-1").strip()
        if not text:
            break
        name, separator, value = text.partition(":")
        if separator and not text.startswith("#"):
            fields[name.strip().lower()] = value.strip().lstrip("=")
    try:
        length = math.prod(int(size) for size in fields["sizes"].split()) * _NRRD_SIZES[fields["type"].lower()]
        encoding = fields["encoding"].lower()
    except (KeyError, ValueError) as error:
        raise ImageRefused("format", f"no NRRD header that we understand ({error}); convert to .nii.gz") from error
    compressions = {"raw": "", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
    if encoding not in compressions:
        raise ImageRefused("format", f"encoding {encoding!r}: only raw, gzip and bzip2 are read; convert to .nii.gz")
    target = fields.get("data file", fields.get("datafile"))
    if target is None:
        return Payload(path, offset, compressions[encoding], length)
    return Payload(_companion(path, target), max(int(fields.get("byte skip", "0")), 0), compressions[encoding], length)


def _companion(path: Path, target: str) -> Path:
    """The file beside a header that holds its voxels."""
    beside = path.parent / target
    if not beside.is_file():
        raise ImageRefused(
            "missing-data", f"the header names {target!r} for its voxels, which is not one file beside it; copy both"
        )
    return beside
