"""Checked reading: what is read is what was written, and what is damaged is refused by its name."""

from __future__ import annotations

import gzip
import locale
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmamba.inference.reading import ImageRefused, read_image

SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")


def refusal(path: Path) -> str:
    with pytest.raises(ImageRefused) as caught:
        read_image(path)
    assert caught.value.text
    assert str(path.parent) not in caught.value.text
    return caught.value.code


def write_itk(path: Path, values_zyx: np.ndarray, compressed: bool = True) -> Path:
    image = SimpleITK.GetImageFromArray(values_zyx)
    image.SetSpacing((2.0, 2.5, 3.0))
    image.SetOrigin((20.0, -7.0, 100.0))
    SimpleITK.WriteImage(image, str(path), useCompression=compressed)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_and_place_come_back(tmp_path, suffix, dtype):
    values = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(dtype)
    image = read_image(write_itk(tmp_path / f"image{suffix}", values, compressed=suffix != ".nhdr"))
    assert np.array_equal(image.values, values)
    assert image.values.dtype == dtype
    expected = np.array([[-2.0, 0, 0, -20], [0, -2.5, 0, 7], [0, 0, 3, 100], [0, 0, 0, 1]])
    assert np.allclose(image.affine, expected, atol=1e-5)
    assert image.spacing_mm == pytest.approx((3.0, 2.5, 2.0))


def test_nifti_agrees_with_nibabel_on_a_real_big_endian_file(odd_images):
    path = odd_images / "anatomical.nii"
    expected = nibabel.load(path)
    image = read_image(path)
    assert np.array_equal(image.values, np.asarray(expected.dataobj).T)
    assert np.allclose(image.affine, expected.affine)


def test_a_real_dicom_series_is_its_nifti_twin(odd_images):
    series, twin = read_image(odd_images / "dicom_STS_025_MR_T1"), read_image(odd_images / "STS_025_MR_T1_image.nii.gz")
    assert series.tags["modality"] == "MR"
    assert series.tags["patient"]
    assert series.values.shape == twin.values.shape
    # Both place every voxel equally, whatever order of rows and slices each has.
    corner = np.array(series.values.shape[::-1]) - 1
    index = np.linalg.inv(twin.affine) @ series.affine
    for voxel in ((0, 0, 0), tuple(corner), (3, 5, 7)):
        x, y, z = np.rint(index @ (*voxel, 1)).astype(int)[:3]
        assert series.values[voxel[::-1]] == twin.values[z, y, x]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("functional.nii", "not-3d"),
        ("tiny.mnc", "format"),
    ],
)
def test_odd_real_files_are_refused_by_name(odd_images, name, code):
    assert refusal(odd_images / name) == code


Damage = Callable[[Path], object]


def cut(share: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(share: float) -> Damage:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(len(content) * share)] ^= 0x10
        path.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("suffix", "damage", "codes"),
    [
        (".nii.gz", cut(0.5), {"truncated"}),
        (".nii.gz", cut(0.97), {"truncated"}),
        (".nii.gz", flip(0.5), {"checksum"}),
        (".nii.gz", cut(0), {"empty"}),
        (".nii", cut(0), {"empty"}),
        (".nii", cut(0.5), {"truncated"}),
        (".nii", cut(0.97), {"truncated"}),
        (".nii", lambda path: path.write_bytes(b"not an image " * 99), {"format"}),
        (".mha", cut(0.9), {"truncated"}),
        (".mha", flip(0.5), {"checksum"}),
        (".mha", cut(0), {"empty"}),
        (".mha", lambda path: path.write_bytes(b"not an image " * 99), {"format"}),
        (".nrrd", cut(0.9), {"truncated"}),
        (".nrrd", flip(0.5), {"checksum"}),
        (".nrrd", cut(0), {"empty"}),
        (".nrrd", lambda path: path.write_bytes(b"not an image " * 99), {"format"}),
        (".mhd", lambda path: path.with_suffix(".zraw").unlink(), {"missing-data"}),
        (".mhd", lambda path: cut(0.9)(path.with_suffix(".zraw")), {"truncated"}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, suffix, damage, codes):
    values = np.random.default_rng(0).integers(-1000, 1000, (16, 17, 18)).astype(np.int16)
    path = write_itk(tmp_path / f"image{suffix}", values)
    damage(path)
    assert refusal(path) in codes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_changed_byte_of_a_compressed_nifti_gives_other_values(tmp_path, data):
    values = np.random.default_rng(0).integers(-9, 9, (4, 5, 6)).astype(np.int16)
    path = tmp_path / "image.nii.gz"
    content = bytearray(gzip.compress(nibabel.Nifti1Image(values, np.eye(4)).to_bytes(), mtime=0))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        image = read_image(path)
    except ImageRefused:
        return
    assert np.array_equal(image.values, values.T)  # a byte that nobody reads: time or system of the compression


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_header_makes_the_reader_fail_otherwise_than_by_refusing(tmp_path, data):
    """Any bytes in the header: a file may be refused or read, but no other error comes, and no memory is asked for."""
    content = bytearray(nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4)).to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 347))
        size = data.draw(st.integers(1, min(8, 348 - at)))
        content[at : at + size] = data.draw(st.binary(min_size=size, max_size=size))
    path = tmp_path / "image.nii"
    path.write_bytes(content)
    try:
        image = read_image(path)
    except ImageRefused:
        return
    assert image.values.ndim == 3
    assert np.isfinite(image.affine).all()


@pytest.mark.parametrize(
    ("header", "dims"),
    [
        (b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 5 x\nencoding: raw\n\n", "sizes"),
        (b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 5 6\nencoding: hex\n\n", "encoding"),
        (b"NRRD0004\ntype: block\ndimension: 3\nsizes: 4 5 6\nencoding: raw\n\n", "type"),
    ],
)
def test_an_nrrd_header_that_cannot_be_followed_is_refused(tmp_path, header, dims):
    path = tmp_path / "image.nrrd"
    path.write_bytes(header + bytes(240))
    assert refusal(path) == "format", dims


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda header: header.set_data_shape((4, 5, 6, 3)), "not-3d"),
        (lambda header: header.set_data_shape((4, 5)), "not-3d"),
        (lambda header: header.set_data_shape((4, 5, 6, 1, 3)), "not-3d"),
        (lambda header: header.set_data_dtype(np.complex64), "voxel-type"),
        (lambda header: header.set_data_dtype(np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), "voxel-type"),
        (lambda header: header.__setitem__("datatype", 77), "voxel-type"),
        (lambda header: header.set_data_shape((4000, 4000, 4000)), "truncated"),
        (lambda header: header.set_sform(np.diag([np.nan, 1, 1, 1]), 1), "geometry"),
        (lambda header: header.set_sform(np.diag([0, 1, 1, 1]), 1), "geometry"),
    ],
)
def test_a_header_that_is_no_scalar_volume_is_refused(tmp_path, change, code):
    header = nibabel.Nifti1Header()
    header.set_data_shape((4, 5, 6))
    header.set_data_dtype(np.int16)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header.set_sform(np.eye(4), 1)
    change(header)
    (tmp_path / "image.nii").write_bytes(header.binaryblock + bytes(4) + bytes(20000))
    assert refusal(tmp_path / "image.nii") == code


@pytest.mark.parametrize(
    ("change", "spacing", "word"),
    [
        (lambda header: header.set_qform(np.diag([3, 3, 5, 1.0]), 1), (3, 2.5, 2), "qform and sform"),
        (lambda header: header.__setitem__("sform_code", 0), (1, 1, 1), "orientation is unknown"),
        (lambda header: header.__setitem__("xyzt_units", 1), (3, 2.5, 2), "unit of length"),
        (lambda header: header.set_sform(np.diag([0.002, 0.0025, 0.003, 1]), 1), (0.003, 0.0025, 0.002), "pixdim"),
    ],
)
def test_odd_geometry_comes_with_a_note(tmp_path, change, spacing, word):
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), None)
    image.header.set_sform(np.diag([2, 2.5, 3, 1]), 1)
    image.header["scl_slope"], image.header["scl_inter"] = 1, 0
    change(image.header)
    nibabel.save(image, tmp_path / "image.nii.gz")
    # nibabel completes a header when it saves an image; write ours as it is.
    content = bytearray(gzip.decompress((tmp_path / "image.nii.gz").read_bytes()))
    content[:348] = image.header.binaryblock[:348]
    content[108:112] = np.float32(352).tobytes()
    (tmp_path / "image.nii").write_bytes(content)
    found = read_image(tmp_path / "image.nii")
    assert found.spacing_mm == pytest.approx(spacing)
    assert word in " ".join(map(str, found.notes))
    assert bool(found.notes) == bool(word)


def test_lengths_in_metres_become_millimetres(tmp_path):
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.diag([0.002, 0.0025, 0.003, 1]))
    image.header["xyzt_units"] = 1
    nibabel.save(image, tmp_path / "image.nii")
    found = read_image(tmp_path / "image.nii")
    assert found.spacing_mm == pytest.approx((3, 2.5, 2))
    assert "not in mm" in found.notes[0].text


def test_rescaling_is_applied_and_a_slope_of_zero_is_none(tmp_path):
    for slope, intercept, expected in ((2.0, -1024.0, -1004.0), (0.0, 5.0, 10.0)):
        image = nibabel.Nifti1Image(np.full((4, 5, 6), 10, np.int16), np.eye(4))
        content = bytearray(image.to_bytes())
        content[112:120] = np.array([slope, intercept], np.float32).tobytes()
        (tmp_path / "image.nii").write_bytes(content)
        assert (read_image(tmp_path / "image.nii").values == expected).all()


def test_a_plain_nifti_with_a_compressed_name_is_read_with_a_note(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4)), tmp_path / "image.nii")
    shutil.move(tmp_path / "image.nii", tmp_path / "image.nii.gz")
    assert "not compressed" in read_image(tmp_path / "image.nii.gz").notes[0].text


def test_a_gzip_that_would_fill_the_memory_is_stopped(tmp_path):
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4))
    compressor = zlib.compressobj(9, wbits=31)
    with (tmp_path / "image.nii.gz").open("wb") as stream:
        stream.write(compressor.compress(image.to_bytes()))
        for _ in range(80):
            stream.write(compressor.compress(bytes(1 << 20)))
        stream.write(compressor.flush())
    assert refusal(tmp_path / "image.nii.gz") == "oversized"


def remove_one(folder: Path) -> None:
    (folder / "000011.dcm").unlink()


def double_one(folder: Path) -> None:
    shutil.copy(folder / "000011.dcm", folder / "copy.dcm")


def cut_one(folder: Path) -> None:
    cut(0.5)(folder / "000011.dcm")


def cut_the_last(folder: Path) -> None:
    cut(0.5)(folder / "000024.dcm")


def empty_one(folder: Path) -> None:
    (folder / "000024.dcm").write_bytes(b"")


def keep_one(folder: Path) -> None:
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")


def write_slice(path: Path, image: SimpleITK.Image) -> None:
    """Write DICOM with the tags of the image, and undo what the writer does to the process: its locale becomes C."""
    before = locale.setlocale(locale.LC_CTYPE)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)
    locale.setlocale(locale.LC_CTYPE, before)


def add_a_series(folder: Path) -> None:
    image = SimpleITK.ReadImage(str(folder / "000011.dcm"))
    image.SetMetaData("0020|000e", "1.2.3.4")
    write_slice(folder / "other.dcm", image)


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (remove_one, {"missing-slice"}),
        (double_one, {"doubled-slice"}),
        (cut_one, {"damaged-slice"}),
        (cut_the_last, {"damaged-slice"}),
        (empty_one, {"damaged-slice"}),
        (keep_one, {"not-3d"}),
        (empty, {"format"}),
        (add_a_series, {"several-series"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_dicom_series_is_refused(odd_images, tmp_path, change, codes):
    folder = tmp_path / "series"
    shutil.copytree(odd_images / "dicom_STS_025_MR_T1", folder)
    change(folder)
    assert refusal(folder) in codes


def test_other_objects_beside_a_series_are_no_slices(odd_images, tmp_path):
    folder = tmp_path / "series"
    shutil.copytree(odd_images / "dicom_STS_025_MR_T1", folder)
    whole = read_image(folder)
    structures = bytearray((folder / "000000.dcm").read_bytes()[:600])  # of a kind of its own, and no image
    at = structures.index(b"1.2.840.10008.5.1.4.1.1.4")
    structures[at + 23 : at + 25] = b"66"
    (folder / "RS.dcm").write_bytes(structures)
    (folder / "notes.txt").write_text("scanned in the morning")
    assert np.array_equal(read_image(folder).values, whole.values)


def test_a_tilted_gantry_is_a_sheared_grid(odd_images, tmp_path):
    """Every slice 1 mm further up than the last, as a gantry tilted by 1 mm per slice leaves them."""
    folder = tmp_path / "series"
    folder.mkdir()
    for k, path in enumerate(sorted((odd_images / "dicom_STS_025_MR_T1").iterdir())[:6]):
        image = SimpleITK.ReadImage(str(path))
        x, y, z = map(float, image.GetMetaData("0020|0032").split("\\"))
        image.SetMetaData("0020|0032", f"{x}\\{y + z * 0.2}\\{z}")
        image.SetOrigin((x, y + z * 0.2, z))
        write_slice(folder / f"{k}.dcm", image)
    assert read_image(folder).shear == pytest.approx(np.sin(np.arctan(0.2)), abs=1e-3)
