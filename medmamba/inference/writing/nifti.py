"""A label volume as NIfTI: the geometry of its image to the last bit, and nothing else of its header."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from medmamba.inference.reading import Image

from .names import NAMES_ECODES, names_as_xml

_LABEL_INTENT = 1002
_SCANNER = 1
_MOST_VOXELS_PER_AXIS = {1: 2**15 - 1, 2: 2**63 - 1}
_LEVEL = 6


def write_nifti(path: str, labels: NDArray[Any], like: Image, names: Mapping[int, str]) -> None:
    """Write one file, with equal bytes for equal arguments.

    Args:
        path: its name says nothing about the format: the content is not compressed.
        labels: (D, H, W) uint8 or uint16.
        like: where the geometry comes from.
    """
    with Path(path).open("wb") as stream:
        _write(stream, labels, like, names)


def write_compressed_nifti(path: str, labels: NDArray[Any], like: Image, names: Mapping[int, str]) -> None:
    """As :func:`write_nifti`, compressed; neither time nor name are in the gzip header."""
    with (
        Path(path).open("wb") as stream,
        gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=stream, mtime=0) as packed,
    ):
        _write(packed, labels, like, names)


def _write(stream: IO[bytes] | gzip.GzipFile, labels: NDArray[Any], like: Image, names: Mapping[int, str]) -> None:
    header = _header(labels, like)
    extension = _extensions(names) if names else b""
    header["vox_offset"] = header.sizeof_hdr + 4 + len(extension)
    stream.write(header.binaryblock + bytes([bool(names), 0, 0, 0]) + extension)
    for plane in labels:
        stream.write(np.ascontiguousarray(plane, header.get_data_dtype()).tobytes())


def _header(labels: NDArray[Any], like: Image) -> Any:
    """Little-endian, whatever the image was: its numbers are the same."""
    version = like.header.version or 1
    if max(labels.shape) > _MOST_VOXELS_PER_AXIS[version]:
        version = 2
    header = (nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header)(endianness="<")
    header.set_data_shape(labels.shape[::-1])
    header.set_data_dtype(labels.dtype.newbyteorder("<"))
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["intent_code"] = _LABEL_INTENT
    if like.header.kind == "nifti":
        _copy_geometry(header, like)
    else:
        _set_geometry(header, like)
    return header


def _copy_geometry(header: Any, like: Image) -> None:
    """Also what contradicts itself or is no number: whoever reads image and labels must see both at one place."""
    facts = like.header
    header["pixdim"] = facts.pixdim
    header["xyzt_units"] = facts.xyzt_units
    header["sform_code"], header["qform_code"] = facts.sform_code, facts.qform_code
    header["srow_x"], header["srow_y"], header["srow_z"] = facts.sform
    header["quatern_b"], header["quatern_c"], header["quatern_d"] = facts.quaternion
    header["qoffset_x"], header["qoffset_y"], header["qoffset_z"] = facts.qoffset


def _set_geometry(header: Any, like: Image) -> None:
    """Both forms where both can say it: a sheared grid has no qform."""
    header.set_xyzt_units("mm")
    header.set_qform(like.affine, code=_SCANNER, strip_shears=True)
    header.set_sform(like.affine, code=_SCANNER)
    if not np.allclose(header.get_qform(), header.get_sform(), rtol=1e-5, atol=1e-3):
        header["qform_code"] = 0


def _extensions(names: Mapping[int, str]) -> bytes:
    """Size, code and text of each; filled up with spaces, which XML may end with, to a multiple of 16."""
    text = names_as_xml(names)
    text += b" " * (-(len(text) + 8) % 16)
    size = (len(text) + 8).to_bytes(4, "little")
    return b"".join(size + code.to_bytes(4, "little") + text for code in NAMES_ECODES)
