"""Every kind of bad input, what is done about it, and the id of the message; all ids of the catalogue occur here.

A row writes one file (or folder) and says what comes: the id of the refusal, or the ids of all notes.
"""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmamba.inference.reading import MESSAGES, Image, ImageRefused, read_image
from medmamba.inference.reading.content import Policy, has_content, settled

SHAPE_XYZ = (9, 10, 11)
SPACING_XYZ = (1.5, 1.75, 2.0)
AFFINE = np.array([[1.5, 0, 0, -20], [0, 1.75, 0, 7], [0, 0, 2.0, 100], [0, 0, 0, 1]])

Change = Callable[[Any], object]
Write = Callable[[Path], Path]


def voxels(shape_xyz: tuple[int, ...] = SHAPE_XYZ, dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape_xyz).astype(dtype)


def nifti(
    change: Change = lambda header: None,
    values: np.ndarray | None = None,
    name: str = "image.nii",
    damage: Callable[[bytes], bytes] = lambda content: content,
    kind: Any = nibabel.Nifti1Header,
) -> Write:
    """A NIfTI whose header is exactly as ``change`` leaves it; then ``damage`` to the bytes of the file."""

    def write(folder: Path) -> Path:
        array = voxels() if values is None else values
        header = kind()
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
        header.set_zooms([*SPACING_XYZ, 1, 1, 1, 1][: array.ndim])
        header.set_sform(AFFINE, 1)
        header.set_qform(AFFINE, 1)
        header.set_xyzt_units("mm")
        header["magic"] = b"n+1" if kind is nibabel.Nifti1Header else b"n+2\0\r\n\x1a\n"
        header["scl_slope"], header["scl_inter"] = 1, 0
        header["vox_offset"] = header.sizeof_hdr + 4
        change(header)
        content = header.binaryblock + bytes(4) + array.astype(array.dtype).tobytes(order="F")
        if name.lower().endswith(".gz"):
            content = gzip.compress(content, mtime=0)
        path = folder / name
        path.write_bytes(damage(content))
        return path

    return write


def itk(
    name: str,
    old: bytes = b"",
    new: bytes = b"",
    values_zyx: np.ndarray | None = None,
    compressed: bool = False,
    damage: Callable[[bytes], bytes] = lambda content: content,
    is_vector: bool = False,
) -> Write:
    """A file of SimpleITK with ``old`` in its header replaced by ``new``."""

    def write(folder: Path) -> Path:
        values = np.ascontiguousarray(voxels().T) if values_zyx is None else values_zyx
        path = folder / name
        SimpleITK.WriteImage(
            SimpleITK.GetImageFromArray(values, isVector=is_vector), str(path), useCompression=compressed
        )
        content = path.read_bytes()
        assert old in content
        path.write_bytes(damage(content.replace(old, new, 1)))
        return path

    return write


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def flip(share: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = int(len(content) * share)
        return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]

    return change


def more_than_announced(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content) + bytes(65 << 20), 1)


def junk(name: str, content: bytes = b"not an image " * 99) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def put(**fields: Any) -> Change:
    def change(header: Any) -> None:
        for name, value in fields.items():
            header[name] = value

    return change


def pixdim(*spacing: float) -> Change:
    def change(header: Any) -> None:
        header["pixdim"][1 : 1 + len(spacing)] = spacing

    return change


def both(*changes: Change) -> Change:
    def change(header: Any) -> None:
        for each in changes:
            each(header)

    return change


NO_SFORM, NO_QFORM = put(sform_code=0), put(qform_code=0)


def sform(matrix: np.ndarray) -> Change:
    return both(NO_QFORM, lambda header: header.set_sform(matrix, 1))


def scaled_geometry(factor: float, unit: str) -> Change:
    def change(header: Any) -> None:
        affine = np.diag([factor, factor, factor, 1.0]) @ AFFINE
        header.set_zooms([size * factor for size in SPACING_XYZ])
        header.set_sform(affine, 1)
        header.set_qform(affine, 1)
        header.set_xyzt_units(unit)

    return change


def sheared(amount: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 1] = amount * affine[1, 1]
    return affine


def oblique(degrees: float) -> np.ndarray:
    turn = np.eye(4)
    turn[:3, :3] = nibabel.eulerangles.euler2mat(*np.deg2rad([degrees, 0, 0]))
    return turn @ AFFINE


def with_values(*odd: tuple[int, float], dtype: Any = np.float32, base: np.ndarray | None = None) -> np.ndarray:
    """The first voxels replaced: (number, value)."""
    values = (voxels() if base is None else base).astype(dtype)
    flat = values.reshape(-1)
    start = 0
    for number, value in odd:
        flat[start : start + number] = value
        start += number
    return values


def many_axes(*more: int) -> np.ndarray:
    return voxels((*SHAPE_XYZ, *more))


def series(odd_images: Path, folder: Path) -> Path:
    shutil.copytree(odd_images / "dicom_STS_025_MR_T1", folder / "series")
    return folder / "series"


def dicom(change: Callable[[Path], object]) -> Write:
    def write(folder: Path) -> Path:
        path = series(Path(__file__).resolve().parents[1] / "data" / "odd_images", folder)
        change(path)
        return path

    return write


def move_a_slice(folder: Path) -> None:
    image = SimpleITK.ReadImage(str(folder / "000011.dcm"))
    x, y, z = map(float, image.GetMetaData("0020|0032").split("\\"))
    image.SetMetaData("0020|0032", f"{x}\\{y}\\{z + 1.0}")
    image.SetOrigin((x, y, z + 1.0))
    rewrite(image, folder / "000011.dcm")


def turn_a_slice(folder: Path) -> None:
    image = SimpleITK.ReadImage(str(folder / "000011.dcm"))
    image.SetMetaData("0020|0037", "0\\1\\0\\1\\0\\0")
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    rewrite(image, folder / "000011.dcm")


def add_a_series(folder: Path) -> None:
    image = SimpleITK.ReadImage(str(folder / "000011.dcm"))
    image.SetMetaData("0020|000e", "1.2.3.4")
    rewrite(image, folder / "other.dcm")


def rewrite(image: SimpleITK.Image, path: Path) -> None:
    import locale

    before = locale.setlocale(locale.LC_CTYPE)  # the writer sets it to C
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)
    locale.setlocale(locale.LC_CTYPE, before)


def keep_one(folder: Path) -> None:
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "image.nii")
    return folder / "image.nii"


def unix_socket(folder: Path) -> Path:
    before = Path.cwd()
    os.chdir(folder)  # its address has a limit of 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("image.nii")
    finally:
        os.chdir(before)
    return folder / "image.nii"


def empty_folder(folder: Path) -> Path:
    (folder / "image.nii.gz").mkdir()
    return folder / "image.nii.gz"


def link(folder: Path) -> Path:
    nifti()(folder).rename(folder / "elsewhere.nii")
    (folder / "image.nii").symlink_to("elsewhere.nii")
    return folder / "image.nii"


def named(name: str) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return nifti(name=path.name)(path.parent) if ".nii" in name.lower() else itk(path.name)(path.parent)

    return write


def named_in_bytes(name: bytes, write: Write) -> Write:
    def rename(folder: Path) -> Path:
        path = write(folder)
        target = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
        path.rename(target)
        return target

    return rename


def header_alone(folder: Path) -> Path:
    path = itk("image.mhd")(folder)
    (folder / "image.raw").unlink()
    return path


def header_elsewhere(folder: Path) -> Path:
    (folder / "sub").mkdir()
    itk("image.mhd", b"ElementDataFile = image.raw", b"ElementDataFile = ../image.raw")(folder / "sub")
    (folder / "sub" / "image.raw").rename(folder / "image.raw")
    return folder / "sub" / "image.mhd"


@dataclass(frozen=True)
class Row:
    """One input, and what comes of it.

    Attributes:
        what: readable name.
        write: makes the file in a folder.
        refused: id of the refusal; "" when the image is taken.
        notes: ids of all notes of an image that is taken.
        spacing: of x, y, z in mm, of an image that is taken.
        reading: arguments of ``read_image``.
        policy: of ``settled``.
    """

    what: str
    write: Write
    refused: str = ""
    notes: tuple[str, ...] = ()
    spacing: tuple[float, ...] = SPACING_XYZ
    reading: dict[str, Any] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)


DIRECTIONS = b"space directions: (1,0,0) (0,1,0) (0,0,1)"
MATRIX = b"TransformMatrix = 1 0 0 0 1 0 0 0 1"
UNIT = (1.0, 1.0, 1.0)
COLOURS = np.zeros(SHAPE_XYZ, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
HALF_NAN = with_values((500, np.nan))
FOUR = {"values_zyx": np.ones((3, 9, 10, 11), np.int16)}

# Rows in the order of their subject: the file, what it holds, where it lies, values.
ROWS = [
    Row("plain", nifti()),
    Row("plain compressed", nifti(name="image.nii.gz")),
    Row("NIfTI-2", nifti(kind=nibabel.Nifti2Header)),
    Row("plain mha", itk("image.mha"), notes=(), spacing=UNIT),
    Row("plain nrrd", itk("image.nrrd"), notes=(), spacing=UNIT),
    Row("gz cut at 50 %", nifti(name="image.nii.gz", damage=cut(0.5)), "MM-IO-004"),
    Row("gz cut at 97 %", nifti(name="image.nii.gz", damage=cut(0.97)), "MM-IO-004"),
    Row("gz without its last byte", nifti(name="image.nii.gz", damage=lambda content: content[:-1]), "MM-IO-004"),
    Row("gz cut in the header", nifti(name="image.nii.gz", damage=lambda content: content[:40]), "MM-IO-004"),
    Row("flipped byte in gz", nifti(name="image.nii.gz", damage=flip(0.5)), "MM-IO-005"),
    Row(
        "flipped byte in the CRC",
        nifti(name="image.nii.gz", damage=lambda c: flip((len(c) - 6) / len(c))(c)),
        "MM-IO-005",
    ),
    Row(
        "flipped byte in the head of gz",
        nifti(name="image.nii.gz", damage=lambda c: c[:2] + b"\x07" + c[3:]),
        "MM-IO-005",
    ),
    Row("raw .nii cut at 50 %", nifti(damage=cut(0.5)), "MM-IO-004"),
    Row("truncated .mha", itk("image.mha", damage=cut(0.9)), "MM-IO-004"),
    Row("truncated compressed .mha", itk("image.mha", compressed=True, damage=cut(0.9)), "MM-IO-004"),
    Row("flipped byte in .mha", itk("image.mha", compressed=True, damage=flip(0.7)), "MM-IO-005"),
    Row("truncated .nrrd", itk("image.nrrd", damage=cut(0.9)), "MM-IO-004"),
    Row("truncated compressed .nrrd", itk("image.nrrd", compressed=True, damage=cut(0.9)), "MM-IO-004"),
    Row("flipped byte in .nrrd", itk("image.nrrd", compressed=True, damage=flip(0.7)), "MM-IO-005"),
    *(Row(f"garbage {name}", junk(name), "MM-IO-008") for name in ("a.nii", "a.nii.gz", "a.mha", "a.nrrd")),
    *(Row(f"0 bytes {name}", junk(name, b""), "MM-IO-003") for name in ("a.nii", "a.nii.gz", "a.mha", "a.nrrd")),
    Row("an mha named .nii", lambda folder: itk("a.mha")(folder).rename(folder / "a.nii"), "MM-IO-008"),
    Row("a nifti named .mha", lambda folder: nifti()(folder).rename(folder / "a.mha"), "MM-IO-008"),
    Row("more than the header can mean", nifti(name="image.nii.gz", damage=more_than_announced), "MM-IO-006"),
    Row("plain .nii named .nii.gz", lambda folder: nifti()(folder).rename(folder / "a.nii.gz"), notes=("MM-IO-070",)),
    Row(
        ".nii.gz named .nii",
        lambda folder: nifti(name="a.nii.gz")(folder).rename(folder / "a.nii"),
        notes=("MM-IO-070",),
    ),
    Row("bytes after a .nii", nifti(damage=lambda content: content + b"more"), notes=("MM-IO-071",)),
    Row(
        "bytes after a gzip", nifti(name="image.nii.gz", damage=lambda content: content + b"more"), notes=("MM-IO-071",)
    ),
    Row("zeros after a gzip", nifti(name="image.nii.gz", damage=lambda content: content + bytes(512))),
    Row("bytes after an .mha", itk("image.mha", damage=lambda c: c + b"more"), notes=("MM-IO-071",), spacing=UNIT),
    Row("unknown suffix", junk("image.dcm"), "MM-IO-007"),
    Row("a header without data", nifti(put(magic=b"ni1")), "MM-IO-010"),
    Row("an .mhd without its data", header_alone, "MM-IO-011"),
    Row("an .mhd that names a file elsewhere", header_elsewhere, "MM-IO-011"),
    Row("an .mhd with its data", itk("image.mhd"), spacing=UNIT),
    Row("axes of length 0", nifti(put(dim=[3, 9, 0, 11, 1, 1, 1, 1])), "MM-IO-009"),
    Row("a number of axes that is none", nifti(put(dim=[77, 9, 10, 11, 1, 1, 1, 1])), "MM-IO-009"),
    Row("an offset that is no number", nifti(put(vox_offset=np.nan)), "MM-IO-009"),
    Row("an offset into the header", nifti(put(vox_offset=8)), "MM-IO-009"),
    Row("a negative axis in .mha", itk("image.mha", b"DimSize = 9 10 11", b"DimSize = 9 10 -11"), "MM-IO-009"),
    Row("voxels as text in .mha", itk("image.mha", b"BinaryData = True", b"BinaryData = False"), "MM-IO-009"),
    Row("an unknown encoding in .nrrd", itk("image.nrrd", b"encoding: raw", b"encoding: hex"), "MM-IO-009"),
    Row(
        "two sizes in .mha",
        itk("image.mha", b"DimSize = 9 10 11\n", b"DimSize = 9 10 11\ndimsize = 9 10 10\n"),
        "MM-IO-009",
    ),
    Row("what only SimpleITK finds", itk("image.nrrd", b"left-posterior-superior", b"left-upside"), "MM-IO-012"),
    Row("huge axes", nifti(put(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1])), "MM-IO-004"),
    Row("huge axes compressed", nifti(put(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), name="a.nii.gz"), "MM-IO-004"),
    Row("huge axes in .mha", itk("image.mha", b"DimSize = 9 10 11", b"DimSize = 99999 99999 11"), "MM-IO-004"),
    Row("a pipe", fifo, "MM-IO-002"),
    Row("a socket", unix_socket, "MM-IO-002"),
    Row("a folder with the name of a file", empty_folder, "MM-IO-040"),
    Row("a link", link),
    *(
        Row(f"name {name}", named(name), spacing=SPACING_XYZ if ".nii" in name.lower() else UNIT)
        for name in (
            "a b/with space.nii.gz",
            "é ü/Größe.nii",
            "患者/画像.nii.gz",
            "患者 é/画像 1.mha",
            "É.nrrd",
            "IMAGE.NII.GZ",
        )
    ),
    Row("a name that is no text", named_in_bytes(b"\xff.nii.gz", nifti(name="a.nii.gz"))),
    Row("a name that is no text for SimpleITK", named_in_bytes(b"\xff.mha", itk("a.mha")), "MM-IO-013"),
    # What it holds.
    Row("RGB", nifti(values=COLOURS), "MM-IO-020"),
    Row("vectors in .mha", itk("a.mha", values_zyx=np.ones((9, 10, 11, 3), np.uint8), is_vector=True), "MM-IO-020"),
    Row("vectors in .nrrd", itk("a.nrrd", values_zyx=np.ones((9, 10, 11, 3), np.uint8), is_vector=True), "MM-IO-020"),
    Row("complex64", nifti(values=voxels(dtype=np.complex64)), "MM-IO-021"),
    Row("complex128", nifti(values=voxels(dtype=np.complex128)), "MM-IO-021"),
    Row("complex in .nrrd", itk("a.nrrd", values_zyx=np.ones((9, 10, 11), np.complex64)), "MM-IO-021"),
    Row("unknown type", nifti(put(datatype=77)), "MM-IO-022"),
    Row("float128", nifti(put(datatype=1536, bitpix=128)), "MM-IO-022"),
    Row("4D with 3 volumes", nifti(values=many_axes(3)), "MM-IO-023"),
    Row("the second of 3 volumes", nifti(values=many_axes(3)), notes=("MM-IO-085",), reading={"volume": 1}),
    Row("the fourth of 3 volumes", nifti(values=many_axes(3)), "MM-IO-026", reading={"volume": 3}),
    Row("4D with one volume", nifti(values=many_axes(1)), notes=("MM-IO-072",)),
    Row("volume 0 of a 3D image", nifti(), reading={"volume": 0}),
    Row("volume 1 of a 3D image", nifti(), "MM-IO-026", reading={"volume": 1}),
    Row("5D", nifti(values=many_axes(1, 3)), "MM-IO-024"),
    Row("5D with one volume", nifti(values=many_axes(1, 1)), notes=("MM-IO-072",)),
    Row("4D in .mha", itk("a.mha", **FOUR), "MM-IO-023"),
    Row(
        "the last of 3 volumes in .mha",
        itk("a.mha", **FOUR),
        notes=("MM-IO-085", "MM-IO-088"),
        spacing=UNIT,
        reading={"volume": 2},
    ),
    Row("the fourth of 3 volumes in .mha", itk("a.mha", **FOUR), "MM-IO-026", reading={"volume": 3}),
    Row(
        "4D with one volume in .nrrd",
        itk("a.nrrd", values_zyx=voxels((1, 9, 10, 11))),
        notes=("MM-IO-072",),
        spacing=UNIT,
    ),
    Row("2D", nifti(values=voxels((20, 30))), "MM-IO-025"),
    Row("2D in .mha", itk("a.mha", values_zyx=voxels((20, 30))), "MM-IO-025"),
    Row(
        "5D in .nrrd",
        itk("a.nrrd", b"dimension: 4\n", b"dimension: 5\n", values_zyx=np.ones((2, 3, 9, 10), np.int16)),
        "MM-IO-009",
    ),
    Row("one slice", nifti(values=voxels((64, 64, 1))), notes=("MM-IO-086",)),
    Row("one voxel", nifti(values=voxels((1, 1, 1))), notes=("MM-IO-086", "MM-IO-088", "MM-IO-091")),
    *(
        Row(f"dtype {dtype}", nifti(values=voxels(dtype=dtype)))
        for dtype in ("int8", "uint8", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
    ),
    # Where it lies.
    Row("pixdim 0", nifti(pixdim(0, 0, 0)), notes=("MM-IO-076", "MM-IO-078")),
    Row("pixdim 0 and only the sform", nifti(both(NO_QFORM, pixdim(0, 0, 0))), notes=("MM-IO-076",)),
    Row("pixdim 0 and only the qform", nifti(both(NO_SFORM, pixdim(0, 0, 0))), "MM-IO-030"),
    Row("pixdim negative", nifti(pixdim(-1.5, 1.75, 2.0)), notes=("MM-IO-077",)),
    Row("pixdim negative and only the qform", nifti(both(NO_SFORM, pixdim(-1.5, 1.75, 2.0))), notes=("MM-IO-077",)),
    Row("pixdim NaN", nifti(both(NO_QFORM, pixdim(np.nan, 1, 1))), notes=("MM-IO-076",)),
    Row("pixdim NaN and no form", nifti(both(NO_QFORM, NO_SFORM, pixdim(np.nan, 1, 1))), "MM-IO-030"),
    Row("pixdim against sform", nifti(both(NO_QFORM, pixdim(1, 1, 5))), notes=("MM-IO-075",)),
    Row("pixdim rounded", nifti(both(NO_QFORM, pixdim(1.501, 1.749, 2.001)))),
    Row(
        "qform and sform disagree",
        nifti(lambda h: h.set_qform(np.diag([3, 3, 5, 1]), 1)),
        notes=("MM-IO-075", "MM-IO-078"),
    ),
    Row(
        "qform and sform disagree, qform preferred",
        nifti(lambda header: header.set_qform(np.diag([3, 3, 5, 1]), 1)),
        notes=("MM-IO-078",),
        spacing=(3, 3, 5),
        reading={"prefer": "qform"},
    ),
    Row("the qform preferred where there is none", nifti(NO_QFORM), reading={"prefer": "qform"}),
    Row("qform without quaternion", nifti(put(quatern_b=2)), notes=("MM-IO-079",)),
    Row("only a qform without quaternion", nifti(both(NO_SFORM, put(quatern_b=2))), "MM-IO-031"),
    Row("only the qform", nifti(NO_SFORM)),
    Row("pixdim[0] is 0", nifti(lambda header: header["pixdim"].__setitem__(0, 0)), notes=("MM-IO-084",)),
    Row("neither form", nifti(both(NO_SFORM, NO_QFORM)), notes=("MM-IO-080",)),
    Row("no directions in .mha", itk("a.mha", MATRIX + b"\n"), notes=("MM-IO-080",), spacing=UNIT),
    Row("no directions in .nrrd", itk("a.nrrd", DIRECTIONS + b"\n"), notes=("MM-IO-080",), spacing=UNIT),
    Row("spacing NaN in .nrrd", itk("a.nrrd", DIRECTIONS, b"spacings: 1 nan 1"), "MM-IO-030"),
    Row(
        "negative spacing in .mha",
        itk("a.mha", b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 -1 1"),
        notes=("MM-IO-077",),
        spacing=UNIT,
    ),
    Row("sform NaN", nifti(sform(np.diag([np.nan, 1, 1, 1]))), "MM-IO-030"),
    Row(
        "sform in one plane",
        nifti(sform(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))),
        "MM-IO-030",
    ),
    Row("metres", nifti(scaled_geometry(0.001, "meter")), notes=("MM-IO-081",)),
    Row("micrometres", nifti(scaled_geometry(1000, "micron")), notes=("MM-IO-081",)),
    Row(
        "half a millimetre in metres",
        nifti(both(NO_QFORM, sform(np.diag([5e-4, 5e-4, 5e-4, 1])), pixdim(5e-4, 5e-4, 5e-4), put(xyzt_units=1))),
        notes=("MM-IO-081", "MM-IO-091"),
        spacing=(0.5, 0.5, 0.5),
    ),
    Row("metres that are millimetres", nifti(put(xyzt_units=1)), notes=("MM-IO-082",)),
    Row("micrometres that are millimetres", nifti(put(xyzt_units=3)), notes=("MM-IO-082",)),
    Row("no unit", nifti(put(xyzt_units=0))),
    Row(
        "shear 0.4",
        nifti(both(sform(sheared(0.4)), pixdim(1.5, 1.75 * np.hypot(1, 0.4), 2))),
        notes=("MM-IO-083",),
        spacing=(1.5, 1.75 * np.hypot(1, 0.4), 2),
    ),
    Row("non-orthonormal by 1e-3", nifti(sform(sheared(1e-3)))),
    Row(
        "shear 0.4 in .mha",
        itk("a.mha", MATRIX, MATRIX.replace(b"0 1 0", b"0.4 1 0", 1)),
        notes=("MM-IO-083",),
        spacing=(1, np.hypot(1, 0.4), 1),
    ),
    Row(
        "oblique by 20 degrees",
        nifti(lambda header: (header.set_sform(oblique(20), 1), header.set_qform(oblique(20), 1))),
    ),
    Row(
        "a metre of slices of 4 m",
        nifti(both(sform(np.diag([400, 400, 400, 1.0])), pixdim(400, 400, 400))),
        notes=("MM-IO-091",),
        spacing=(400, 400, 400),
    ),
    # DICOM.
    Row("several series", dicom(add_a_series), "MM-IO-041"),
    Row("one slice of a series", dicom(keep_one), "MM-IO-042"),
    Row("a missing slice", dicom(lambda folder: (folder / "000011.dcm").unlink()), "MM-IO-043"),
    Row("a doubled slice", dicom(lambda folder: shutil.copy(folder / "000011.dcm", folder / "copy.dcm")), "MM-IO-044"),
    Row("an uneven slice", dicom(move_a_slice), "MM-IO-045"),
    Row("a damaged slice", dicom(lambda folder: (folder / "000024.dcm").write_bytes(b"")), "MM-IO-046"),
    Row("a turned slice", dicom(turn_a_slice), "MM-IO-047"),
    # Values.
    Row("scl_slope 0", nifti(put(scl_slope=0)), notes=("MM-IO-073",)),
    Row("scl_slope NaN", nifti(put(scl_slope=np.nan)), notes=("MM-IO-073",)),
    Row("scl_inter NaN", nifti(put(scl_inter=np.nan)), notes=("MM-IO-074",)),
    Row("one NaN", nifti(values=with_values((1, np.nan))), notes=("MM-IO-087",)),
    Row("one Inf", nifti(values=with_values((1, np.inf))), notes=("MM-IO-087",)),
    Row("one -Inf", nifti(values=with_values((1, -np.inf))), notes=("MM-IO-087",)),
    Row("NaN and Inf", nifti(values=with_values((2, np.nan), (2, np.inf), dtype=np.float64)), notes=("MM-IO-087",)),
    Row("half of it NaN", nifti(values=HALF_NAN), "MM-IO-050"),
    Row("all NaN", nifti(values=with_values((990, np.nan))), "MM-IO-050"),
    Row(
        "2 % NaN where 5 % may be",
        nifti(values=with_values((20, np.nan))),
        notes=("MM-IO-087",),
        policy=Policy(max_not_finite=0.05),
    ),
    Row(
        "one NaN where none may be",
        nifti(values=with_values((1, np.nan))),
        "MM-IO-050",
        policy=Policy(max_not_finite=0.0),
    ),
    Row("one NaN in .mha", itk("a.mha", values_zyx=with_values((1, np.nan))), notes=("MM-IO-087",), spacing=UNIT),
    Row("half of it NaN in .nrrd", itk("a.nrrd", values_zyx=HALF_NAN), "MM-IO-050"),
    Row("all zeros", nifti(values=np.zeros(SHAPE_XYZ, np.int16)), notes=("MM-IO-088",)),
    Row("all -1024", nifti(values=np.full(SHAPE_XYZ, -1024, np.int16)), notes=("MM-IO-088",)),
    Row("1e300", nifti(values=with_values((1, 1e300), dtype=np.float64)), "MM-IO-052"),
    Row(
        "1e300 forced", nifti(values=with_values((1, 1e300), dtype=np.float64)), "MM-IO-052", policy=Policy(force=True)
    ),
    Row("1e300 rescaled", nifti(put(scl_slope=2), values=with_values((1, 1e300), dtype=np.float64)), "MM-IO-052"),
    Row("uint64 2^62", nifti(values=with_values((1, 2**62), dtype=np.uint64)), "MM-IO-051"),
    Row(
        "uint64 2^62 forced",
        nifti(values=with_values((1, 2**62), dtype=np.uint64)),
        notes=("MM-IO-089",),
        policy=Policy(force=True),
    ),
    Row("70000 in a CT", nifti(values=with_values((1, 70000))), "MM-IO-051", policy=Policy(is_ct=True)),
    Row(
        "70000 in a CT forced",
        nifti(values=with_values((1, 70000))),
        notes=("MM-IO-089",),
        policy=Policy(is_ct=True, force=True),
    ),
    Row("70000 in a PET", nifti(values=with_values((1, 70000)))),
]


def take(path: Path, row: Row) -> Image:
    return settled(read_image(path, **row.reading), row.policy)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_an_odd_file_is_refused_or_taken_as_the_table_says(tmp_path, row):
    path = row.write(tmp_path)
    if row.refused:
        with pytest.raises(ImageRefused) as caught:
            take(path, row)
        assert caught.value.id == row.refused
        assert caught.value.code == MESSAGES[row.refused].code
        assert str(path.parent) not in caught.value.text
        return
    image = take(path, row)
    assert tuple(sorted(note.id for note in image.notes)) == row.notes, image.notes
    assert np.isfinite([image.values.min(), image.values.max()]).all()
    assert image.spacing_mm[::-1] == pytest.approx(row.spacing, rel=1e-5)


def test_every_message_of_the_readers_is_provoked_by_a_row(ids_in):
    provoked = {row.refused for row in ROWS if row.refused} | {note for row in ROWS for note in row.notes}
    assert provoked == ids_in("reading")


def test_the_catalogue_has_every_id_of_the_code_and_no_other(ids_in):
    assert ids_in("") == set(MESSAGES)


def test_a_refusal_survives_the_way_from_another_process(tmp_path):
    with pytest.raises(ImageRefused) as caught:
        read_image(junk("image.nii")(tmp_path))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.id, again.code, again.text) == (caught.value.id, caught.value.code, caught.value.text)
    assert str(again).startswith("MM-IO-008 format: ")


def test_nothing_is_replaced_in_an_image_without_nan(tmp_path):
    image = read_image(nifti(values=with_values())(tmp_path))
    assert settled(image).values is image.values


def test_nan_becomes_the_smallest_value_and_nothing_else_changes(tmp_path):
    values = with_values((3, np.nan), (2, np.inf), (1, -7.0))
    image = settled(read_image(nifti(values=values)(tmp_path)))
    expected = values.copy()
    expected[~np.isfinite(values)] = -7.0
    assert np.array_equal(image.values, expected.T)
    assert image.values.dtype == np.float32


@pytest.mark.parametrize("value", [0, -1024])
def test_an_image_of_one_value_has_no_content(tmp_path, value):
    assert not has_content(settled(read_image(nifti(values=np.full(SHAPE_XYZ, value, np.int16))(tmp_path))))
    assert has_content(settled(read_image(nifti()(tmp_path))))


@pytest.mark.parametrize("volume", [0, 1, 2])
@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
def test_a_volume_of_a_series_is_that_volume(tmp_path, name, volume):
    values = many_axes(3)
    found = read_image(nifti(values=values, name=name)(tmp_path), volume=volume)
    assert np.array_equal(found.values, values[..., volume].T)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mhd"])
def test_a_volume_of_a_series_in_other_formats_is_that_volume(tmp_path, suffix):
    values = voxels((3, 9, 10, 11))
    found = read_image(itk(f"image{suffix}", values_zyx=values)(tmp_path), volume=2)
    assert np.array_equal(found.values, values[2])


REAL = [
    ("anatomical.nii", ""),
    ("functional.nii", "MM-IO-023"),
    ("resampled_anat_moved.nii", "MM-IO-050"),  # a seventh of it is NaN
    ("tiny.mnc", "MM-IO-007"),
    ("prostate_phantom_subvolume-label.nrrd", ""),
    ("dicom_STS_025_MR_T1", ""),
    ("STS_025_MR_T1_image.nii.gz", ""),
    ("STS_025_MR_T1_mask.nii.gz", ""),
    ("ibsi_orientation.nii.gz", ""),
]


@pytest.mark.parametrize(("name", "identifier"), REAL, ids=lambda value: value)
def test_odd_real_images_are_taken_without_a_note_or_refused(odd_images, name, identifier):
    if not identifier:
        assert settled(read_image(odd_images / name)).notes == ()
        return
    with pytest.raises(ImageRefused) as caught:
        settled(read_image(odd_images / name))
    assert caught.value.id == identifier


@pytest.mark.parametrize("volume", [0, 7, 19])
def test_a_volume_of_a_real_series_agrees_with_nibabel(odd_images, volume):
    expected = nibabel.load(odd_images / "functional.nii")
    found = read_image(odd_images / "functional.nii", volume=volume)
    assert np.allclose(found.values, np.asarray(expected.dataobj)[..., volume].T, rtol=1e-6)
    assert np.allclose(found.affine, expected.affine)


def test_an_unreadable_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nothing.nii")
    (tmp_path / "link.nii").symlink_to("nothing.nii")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "link.nii")


TEXT_HEADERS = {
    ".mha": b"NDims = 3\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = 4 5 6\n"
    b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n",
    ".nrrd": b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 5 6\n"
    b"space directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: raw\nspace origin: (0,0,0)\n\n",
}
ODD_WORDS = [
    "nan",
    "-1",
    "0",
    "1e400",
    "99999999999999999999",
    "x",
    "",
    "3 3",
    "LOCAL",
    "LIST",
    "%03d 1 3 1",
    "../x",
    "\xff",
    "4",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(TEXT_HEADERS)), st.data())
def test_no_text_header_makes_the_reader_fail_otherwise_than_by_refusing(tmp_path, suffix, data):
    """Words exchanged, lines lost or doubled: a file may be refused or read, with as many voxels as it has."""
    lines = TEXT_HEADERS[suffix].split(b"\n")
    for _ in range(data.draw(st.integers(1, 3))):
        k = data.draw(st.integers(0, len(lines) - 1))
        words = lines[k].split(b" ")
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.sampled_from(ODD_WORDS)).encode("latin-1")
        lines[k : k + 1] = data.draw(st.sampled_from([[b" ".join(words)], [], [lines[k], b" ".join(words)]]))
        lines = lines or [b""]
    path = tmp_path / f"image{suffix}"
    path.write_bytes(b"\n".join(lines) + bytes(240))
    try:
        image = read_image(path)
    except ImageRefused:
        return
    assert image.values.ndim == 3
    assert image.values.nbytes <= path.stat().st_size
    assert np.isfinite(image.affine).all()
