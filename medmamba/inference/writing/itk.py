"""A label volume as MetaImage or NRRD, and the way back through SimpleITK.

Both are a text header and compressed voxels. They are written here and not by SimpleITK because its geometry passes
through a matrix of unit vectors, and so that the same labels are the same bytes with every version of it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.inference.reading import Image

from .names import names_as_fields

_LEVEL = 6
#: Our axes point right and anterior, those of the files left and posterior.
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_meta(path: str, labels: NDArray[Any], like: Image, names: Mapping[int, str]) -> None:
    """Write a ``.mha``, with equal bytes for equal arguments; ``labels`` (D, H, W) is uint8 or uint16."""
    affine = _TO_LPS @ like.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    packer = zlib.compressobj(_LEVEL)
    voxels = b"".join([*(packer.compress(_plane(plane)) for plane in labels), packer.flush()])
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "True",
        "CompressedDataSize": str(len(voxels)),
        "TransformMatrix": _numbers((affine[:3, :3] / spacing).T.ravel()),
        "Offset": _numbers(affine[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": _numbers(spacing),
        "DimSize": " ".join(map(str, labels.shape[::-1])),
        **{key: _ascii(text) for key, text in names_as_fields(names, labels.shape)},
        "ElementType": "MET_UCHAR" if labels.dtype.itemsize == 1 else "MET_USHORT",
        "ElementDataFile": "LOCAL",  # voxels follow this line
    }
    text = "".join(f"{key} = {value}\n" for key, value in fields.items())
    with Path(path).open("wb") as stream:
        stream.write(text.encode())
        stream.write(voxels)


def write_nrrd(path: str, labels: NDArray[Any], like: Image, names: Mapping[int, str]) -> None:
    """Write a ``.nrrd``, with equal bytes for equal arguments; ``labels`` (D, H, W) is uint8 or uint16."""
    affine = _TO_LPS @ like.affine
    lines = [
        "NRRD0005",
        f"type: unsigned {'char' if labels.dtype.itemsize == 1 else 'short'}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, labels.shape[::-1]))}",
        "space directions: " + " ".join(f"({_numbers(step, chr(44))})" for step in affine[:3, :3].T),
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
        f"space origin: ({_numbers(affine[:3, 3], ',')})",
        *(f"{key}:={_escaped(text)}" for key, text in names_as_fields(names, labels.shape)),
        "\n",
    ]
    with Path(path).open("wb") as stream:
        stream.write("\n".join(lines).encode())
        with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=stream, mtime=0) as packed:
            for plane in labels:
                packed.write(_plane(plane))


def read_meta(path: Path) -> Image:
    """Read what :func:`write_meta` wrote, whatever its name is."""
    return _read(path, "MetaImageIO")


def read_nrrd(path: Path) -> Image:
    """Read what :func:`write_nrrd` wrote, whatever its name is."""
    return _read(path, "NrrdImageIO")


def _read(path: Path, image_io: str) -> Image:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(image_io)
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Image(SimpleITK.GetArrayFromImage(image), _TO_LPS @ affine)


def _plane(plane: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(plane, plane.dtype.newbyteorder("<")).tobytes()


def _numbers(values: Iterable[float], between: str = " ") -> str:
    """With as many digits as bring the same float64 back."""
    return between.join(repr(float(value) + 0.0) for value in values)  # + 0.0 turns -0.0 into 0.0


def _ascii(text: str) -> str:
    """As within JSON's quotes: MetaIO cuts what is not ASCII off the end of a line."""
    return json.dumps(text)[1:-1]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\")
