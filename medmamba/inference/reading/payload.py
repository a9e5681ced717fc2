"""MetaImage and NRRD: that the data are complete and undamaged, before SimpleITK reads them.

Both formats have a text header that says where the data begin, how they are compressed and how long they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from .compressed import inflate
from .image import Note
from .messages import noted, refused
from .recognise import recognised

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
    """Where the voxels of an image are.

    Attributes:
        path: their file.
        offset: first byte.
        compression: "", "gzip", "zlib" or "bzip2".
        voxels: their number, times that of components.
        length: their number of bytes, decompressed.
        notes: what is odd about the header.
    """

    path: Path
    offset: int
    compression: str
    voxels: int
    length: int
    notes: tuple[Note, ...] = ()


def checked_payload(path: Path) -> Payload:
    """Read the voxels of a .mha, .mhd, .nrrd or .nhdr to the end, and say where they are.

    Raises:
        ImageRefused: "empty", "format", "truncated", "checksum", "oversized" or "missing-data".
        OSError: a file cannot be read.
    """
    with path.open("rb") as stream:
        head = stream.read(_MOST_HEADER_BYTES)
    if not head:
        raise refused("MM-IO-003", "the file is empty; copy or download it again")
    payload = _nrrd_payload(path, head) if path.suffix.lower() in (".nrrd", ".nhdr") else _meta_payload(path, head)
    if payload.compression:
        inflated = inflate(payload.path, payload.compression, offset=payload.offset, limit=payload.length, keep=False)
        found, trailing = inflated.length, inflated.trailing
    else:
        found = payload.path.stat().st_size - payload.offset
        trailing = found - payload.length
    if found < payload.length:
        raise refused(
            "MM-IO-004", f"its header announces {payload.length} bytes of voxels, {found} are there; copy it again"
        )
    if trailing > 0:
        return replace(payload, notes=(*payload.notes, noted("MM-IO-071", f"{trailing} bytes follow the last voxel")))
    return payload


def _meta_payload(path: Path, head: bytes) -> Payload:
    fields, offset = _meta_fields(head)
    if "ndims" not in fields and "dimsize" not in fields:
        raise refused(
            "MM-IO-008", f"this is {recognised(head)}, whatever its name says; rename or convert it to .nii.gz"
        )
    try:
        dims = [int(size) for size in fields["dimsize"].split()]
        kind = fields["elementtype"].upper().removeprefix("MET_").removeprefix("U").removesuffix("_ARRAY")
        channels = int(fields.get("elementnumberofchannels", "1"))
        voxels = _product(dims, int(fields["ndims"])) * channels
        length = voxels * _META_TYPES[kind]
        target, skip = fields["elementdatafile"], int(fields.get("headersize", "0"))
    except (KeyError, ValueError) as error:
        raise refused("MM-IO-009", f"no MetaImage header that we understand ({error}); convert to .nii.gz") from error
    if fields.get("binarydata", "true").lower() == "false":
        raise refused("MM-IO-009", "voxels are written as text (BinaryData = False); convert it to .nii.gz")
    compression = "zlib" if fields.get("compresseddata", "false").lower() == "true" else ""
    notes = _notes_on_meta(fields)
    if target.upper() == "LOCAL":
        return Payload(path, offset, compression, voxels, length, notes)
    companion = _companion(path, target)
    # -1: the voxels are what the file ends with.
    start = max(companion.stat().st_size - length, 0) if skip < 0 else skip
    return Payload(companion, start, compression, voxels, length, notes)


def _notes_on_meta(fields: dict[str, str]) -> tuple[Note, ...]:
    notes = []
    spacing = fields.get("elementspacing", "")
    if any(size.startswith("-") for size in spacing.split()):
        notes.append(noted("MM-IO-077", f"the spacing is {spacing}; its absolute values count"))
    if not {"transformmatrix", "rotation", "orientation"} & set(fields):
        notes.append(_unknown())
    return tuple(notes)


def _unknown() -> Note:
    text = "the header has no directions: the orientation is unknown, taken as left, posterior, superior"
    return noted("MM-IO-080", text)


def _product(sizes: list[int], axes: int) -> int:
    if len(sizes) != axes or min(sizes) < 1:
        raise ValueError(f"{axes} axes of {sizes}")
    return math.prod(sizes)


def _meta_fields(head: bytes) -> tuple[dict[str, str], int]:
    """Fields of a MetaImage header in lower case, and the byte after it."""
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
    return fields, offset


def _nrrd_payload(path: Path, head: bytes) -> Payload:
    if not head.startswith(b"NRRD"):
        raise refused(
            "MM-IO-008", f"this is {recognised(head)}, whatever its name says; rename or convert it to .nii.gz"
        )
    fields, offset = _nrrd_fields(head)
    try:
        sizes = [int(size) for size in fields["sizes"].split()]
        voxels = _product(sizes, int(fields["dimension"]))
        length = voxels * _NRRD_SIZES[fields["type"].lower()]
        encoding = fields["encoding"].lower()
        skip = int(fields.get("byte skip", "0"))
    except (KeyError, ValueError) as error:
        raise refused("MM-IO-009", f"no NRRD header that we understand ({error}); convert to .nii.gz") from error
    compressions = {"raw": "", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
    if encoding not in compressions:
        raise refused("MM-IO-009", f"encoding {encoding!r}: only raw, gzip and bzip2 are read; convert to .nii.gz")
    if "nan" in fields.get("spacings", "").lower():
        raise refused("MM-IO-030", f"the spacing is {fields['spacings']}; write the geometry anew")
    notes = () if {"space", "space dimension"} & set(fields) and "space directions" in fields else (_unknown(),)
    target = fields.get("data file", fields.get("datafile"))
    if target is None:
        return Payload(path, offset, compressions[encoding], voxels, length, notes)
    companion = _companion(path, target)
    start = max(companion.stat().st_size - length, 0) if skip < 0 else skip
    return Payload(companion, start, compressions[encoding], voxels, length, notes)


def _nrrd_fields(head: bytes) -> tuple[dict[str, str], int]:
    """Fields of an NRRD header in lower case, and the byte after it."""
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
    return fields, offset


def _companion(path: Path, target: str) -> Path:
    """The file beside a header that holds its voxels; a header may not name one elsewhere."""
    beside = path.parent / target
    if str(Path(target)) != beside.name or not beside.is_file():
        raise refused(
            "MM-IO-011", f"the header names {target!r} for its voxels, which is not one file beside it; copy both"
        )
    return beside
