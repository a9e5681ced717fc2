"""Writing segmentations: the grid of the image, names within, and nothing under a final name that is not right."""

from __future__ import annotations

import gzip
import hashlib
import json
import resource
import signal
import struct
import time
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from medmamba.inference.reading import Image, ImageRefused, read_image
from medmamba.inference.writing import (
    NAMES_ECODES,
    WRITABLE_SUFFIXES,
    WriteFailed,
    names_of,
    suffix_of,
    verify_segmentation,
    write_segmentation,
)

NAMES = {0: "background", 1: "liver", 2: 'kidney <left> & "right"', 3: "Gallenblase übergroß 肝"}
GEOMETRY = ("pixdim", "xyzt_units", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z")
GEOMETRY += ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
ORIENTATIONS = [
    pytest.param(
        order, signs, id="".join(f"{'-' if sign < 0 else ''}{axis}" for axis, sign in zip(order, signs, strict=True))
    )
    for order in permutations(range(3))
    for signs in product((1, -1), repeat=3)
]


def some_labels(image: Image, most: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, most + 1, image.values.shape).astype(np.uint16)


def raw_header(path: Path) -> nibabel.Nifti1Header:
    """As it stands in the file: ``nibabel.load`` mends what it finds."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.name.endswith(".gz") else data
    kind = nibabel.Nifti2Header if 540 in (struct.unpack(o + "i", data[:4])[0] for o in "<>") else nibabel.Nifti1Header
    order = "<" if struct.unpack("<i", data[:4])[0] == kind.sizeof_hdr else ">"
    return kind(data[: kind.sizeof_hdr], endianness=order, check=False)


def assert_same_geometry(first: Path, second: Path) -> None:
    before, after = raw_header(first), raw_header(second)
    assert before.sizeof_hdr == after.sizeof_hdr
    for name in GEOMETRY:
        one, two = (np.asarray(header[name]).astype(header[name].dtype.newbyteorder("<")) for header in (before, after))
        assert one.tobytes() == two.tobytes(), name


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_labels_come_back_where_the_image_is(tmp_path, write_image, suffix):
    image = read_image(write_image(tmp_path / "image.nii.gz"))
    labels = some_labels(image)
    digest = write_segmentation(tmp_path / f"out{suffix}", labels, image, NAMES)
    back = read_image(tmp_path / f"out{suffix}")
    assert back.values.dtype == np.uint8
    np.testing.assert_array_equal(back.values, labels)
    np.testing.assert_allclose(back.affine, image.affine, atol=1e-9)
    assert digest == hashlib.sha256((tmp_path / f"out{suffix}").read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.nii.gz", f"out{suffix}"]


@pytest.mark.parametrize("source", [".mha", ".nrrd", ".nii"])
@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_formats_go_into_each_other(tmp_path, write_image, source, suffix):
    image = SimpleITK.ReadImage(str(write_image(tmp_path / "first.nii", at=np.diag([-1.5, -2, 3, 1.0]))))
    SimpleITK.WriteImage(image, str(tmp_path / f"image{source}"))
    image = read_image(tmp_path / f"image{source}")
    write_segmentation(tmp_path / f"out{suffix}", some_labels(image), image, NAMES)
    np.testing.assert_allclose(read_image(tmp_path / f"out{suffix}").affine, image.affine, atol=1e-5)
    itk = SimpleITK.ReadImage(str(tmp_path / f"out{suffix}"))  # and what others read
    reference = SimpleITK.ReadImage(str(tmp_path / f"image{source}"))
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(itk, fact)(), getattr(reference, fact)(), atol=1e-5)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
def test_all_48_orientations_stay(tmp_path, write_image, order, signs, suffix):
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[list(order)] * np.array(signs) * [1.5, 2, 3]
    affine[:3, 3] = [-10, 20, 30.5]
    path = write_image(tmp_path / "image.nii", at=affine)
    image = read_image(path)
    write_segmentation(tmp_path / f"out{suffix}", some_labels(image), image, NAMES)
    np.testing.assert_allclose(read_image(tmp_path / f"out{suffix}").affine, affine, atol=1e-9)
    if suffix == ".nii":
        assert_same_geometry(path, tmp_path / "out.nii")


def set_odd(header: nibabel.Nifti1Header, **fields: object) -> nibabel.Nifti1Header:
    for name, value in fields.items():
        header[name] = value
    return header


@pytest.mark.parametrize(
    "fields",
    [
        {"sform_code": 0},
        {"qform_code": 0, "sform_code": 4},
        {"qform_code": 0, "sform_code": 0},
        {"pixdim": [-1, 1, 1, 5, 7, 0, 0, 0]},
        {"pixdim": [1, 0, float("nan"), 2, 0, 0, 0, 0]},
        {"pixdim": [1, -1.5, 2.5, 3, 0, 0, 0, 0]},
        {"qoffset_x": 1e4, "quatern_b": 0.3},
        {"xyzt_units": 1},
        {"xyzt_units": 2 | 8},
        {"xyzt_units": 3},
        {"srow_x": [1.1, 0.4, 0, 3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("version", [1, 2])
def test_a_header_that_contradicts_itself_comes_back_as_it_is(tmp_path, affine, fields, order, version):
    kind = {1: nibabel.Nifti1Header, 2: nibabel.Nifti2Header}[version]
    header = kind(endianness=order)
    header.set_data_shape((5, 6, 7))
    header.set_data_dtype(np.dtype("i2").newbyteorder(order))
    header.set_qform(affine, 1, strip_shears=True)
    header.set_sform(affine, 2)
    header["vox_offset"] = kind.sizeof_hdr + 4
    set_odd(header, **fields)
    path = tmp_path / "image.nii"
    path.write_bytes(header.binaryblock + bytes(4) + bytes(5 * 6 * 7 * 2))
    image = read_image(path)
    write_segmentation(tmp_path / "out.nii.gz", some_labels(image), image, NAMES)
    assert_same_geometry(path, tmp_path / "out.nii.gz")


@settings(max_examples=60, deadline=None)
@given(
    matrix=st.lists(st.floats(-50, 50, width=32), min_size=9, max_size=9),
    offset=st.lists(st.floats(-5000, 5000, width=32), min_size=3, max_size=3),
    units=st.sampled_from([0, 1, 2, 3, 10]),
    codes=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    suffix=st.sampled_from(WRITABLE_SUFFIXES),
)
def test_any_affine_of_a_readable_nifti_comes_back(tmp_path_factory, matrix, offset, units, codes, suffix):
    folder = tmp_path_factory.mktemp("any")
    affine = np.eye(4)
    affine[:3] = np.column_stack([np.reshape(matrix, (3, 3)), offset])
    assume(abs(np.linalg.det(affine)) > 1e-6)
    image = nibabel.Nifti1Image(np.zeros((4, 3, 2), np.int16), affine)
    image.header.set_qform(affine, codes[0], strip_shears=True)
    image.header.set_sform(affine, codes[1])
    image.header["xyzt_units"] = units
    nibabel.save(image, folder / "image.nii")
    try:
        like = read_image(folder / "image.nii")
    except ImageRefused:
        reject()
    write_segmentation(folder / f"out{suffix}", some_labels(like), like, NAMES)
    back = read_image(folder / f"out{suffix}")
    np.testing.assert_allclose(back.affine, like.affine, rtol=1e-6, atol=1e-3)
    if suffix.startswith(".nii"):
        assert_same_geometry(folder / "image.nii", folder / f"out{suffix}")


def test_the_rest_of_the_header_is_that_of_labels(tmp_path, write_image):
    source = nibabel.load(write_image(tmp_path / "image.nii.gz"))
    source.header["descrip"], source.header["intent_name"] = b"Jane Doe", b"Jane"
    source.header.set_slope_inter(2.0, -1024)
    source.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nibabel.save(source, tmp_path / "image.nii.gz")
    image = read_image(tmp_path / "image.nii.gz")
    write_segmentation(tmp_path / "out.nii", some_labels(image), image, NAMES)
    header = raw_header(tmp_path / "out.nii")
    assert (header["scl_slope"], header["scl_inter"]) == (1, 0)
    assert header.get_intent()[0] == "label"
    assert header["dim"].tolist() == [3, 14, 12, 10, 1, 1, 1, 1]
    assert b"Jane" not in (tmp_path / "out.nii").read_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_names_are_in_the_header_extension(tmp_path, write_image, version):
    image = read_image(write_image(tmp_path / "image.nii"))
    image = replace(image, header=replace(image.header, version=version))
    labels = some_labels(image)
    write_segmentation(tmp_path / "out.nii.gz", labels, image, NAMES)
    assert names_of(tmp_path / "out.nii.gz") == NAMES
    loaded = nibabel.load(tmp_path / "out.nii.gz")
    assert tuple(extension.get_code() for extension in loaded.header.extensions) == NAMES_ECODES == (0, 30)
    first, second = (extension.content for extension in loaded.header.extensions)
    assert first == second == loaded.header.extensions[0].get_content()  # as TotalSegmentator asks for it
    assert first.startswith(b"<?xml")
    assert b"\0" not in first
    np.testing.assert_array_equal(np.asarray(loaded.dataobj).T, labels)


def test_a_file_without_names_has_no_extension(tmp_path, write_image):
    image = read_image(write_image(tmp_path / "image.nii"))
    write_segmentation(tmp_path / "out.nii", some_labels(image), image, {})
    assert names_of(tmp_path / "out.nii") == {}
    assert raw_header(tmp_path / "out.nii")["vox_offset"] == 352


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_names_are_in_the_metadata(tmp_path, write_image, suffix):
    image = read_image(write_image(tmp_path / "image.nii"))
    write_segmentation(tmp_path / f"out{suffix}", some_labels(image), image, {**NAMES, 7: r"back\slash"})
    itk = SimpleITK.ReadImage(str(tmp_path / f"out{suffix}"))
    fields = {key: itk.GetMetaData(key).encode("utf-8", "surrogateescape").decode() for key in itk.GetMetaDataKeys()}
    found = {}
    for k in range(4):
        name = fields[f"Segment{k}_Name"]
        # MetaIO cuts what is not ASCII off a line, hence JSON's escapes there.
        found[int(fields[f"Segment{k}_LabelValue"])] = json.loads(f'"{name}"') if suffix == ".mha" else name
    assert found == {1: NAMES[1], 2: NAMES[2], 3: NAMES[3], 7: r"back\slash"}


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_labels_above_255_are_two_bytes(tmp_path, write_image, suffix):
    image = read_image(write_image(tmp_path / "image.nii"))
    labels = some_labels(image, most=600)
    write_segmentation(tmp_path / f"out{suffix}", labels, image, {600: "last"})
    back = read_image(tmp_path / f"out{suffix}")
    assert back.values.dtype == np.uint16
    np.testing.assert_array_equal(back.values, labels)


def test_the_type_is_that_of_the_model_and_not_of_the_case(tmp_path, write_image):
    image = read_image(write_image(tmp_path / "image.nii"))
    write_segmentation(tmp_path / "out.nii", some_labels(image), image, {0: "background", 256: "rare"})
    assert read_image(tmp_path / "out.nii").values.dtype == np.uint16


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_equal_labels_are_equal_files_whatever_and_whenever(tmp_path, write_image, suffix, monkeypatch):
    image = read_image(write_image(tmp_path / "image.nii"))
    labels = some_labels(image)
    (tmp_path / "other").mkdir()
    first = write_segmentation(tmp_path / f"a{suffix}", labels, image, NAMES)
    # Another day, memory layout, type and order of names.
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    again = np.asfortranarray(labels.astype(np.int64))
    second = write_segmentation(tmp_path / "other" / f"b{suffix}", again, image, dict(reversed(NAMES.items())))
    assert first == second


@pytest.mark.parametrize(
    ("labels", "names", "text"),
    [
        (np.zeros((10, 12, 13), np.uint8), {}, "labels are"),
        (np.zeros((10, 12, 14), np.float32), {}, "not whole numbers"),
        (np.full((10, 12, 14), -1), {}, "do not fit"),
        (np.full((10, 12, 14), 65536), {}, "do not fit"),
        (np.zeros((10, 12, 14), np.uint8), {1: "two\nlines"}, "rename it in the model"),
    ],
)
def test_what_is_no_segmentation_is_refused(tmp_path, write_image, labels, names, text):
    image = read_image(write_image(tmp_path / "image.nii"))
    with pytest.raises(WriteFailed, match=text):
        write_segmentation(tmp_path / "out.nii", labels, image, names)
    assert not (tmp_path / "out.nii").exists()


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(mount_disk, tmp_path, write_image, suffix):
    values = np.zeros((64, 64, 64), np.int16)
    image = read_image(write_image(tmp_path / "image.nii", values=values))
    disk = mount_disk("64k")
    labels = np.random.default_rng(0).integers(0, 200, (64, 64, 64))
    with pytest.raises(WriteFailed, match="make room") as caught:
        write_segmentation(disk / f"out{suffix}", labels, image, NAMES)
    assert caught.value.code == "disk-full"
    assert list(disk.iterdir()) == []


def test_a_full_disk_keeps_what_was_there(mount_disk, tmp_path, write_image):
    image = read_image(write_image(tmp_path / "image.nii", values=np.zeros((64, 64, 64), np.int16)))
    disk = mount_disk("64k")
    digest = write_segmentation(disk / "out.nii.gz", np.zeros((64, 64, 64), np.uint8), image, NAMES)
    with pytest.raises(WriteFailed):
        write_segmentation(disk / "out.nii.gz", np.random.default_rng(0).integers(0, 200, (64, 64, 64)), image, NAMES)
    assert verify_segmentation(disk / "out.nii.gz", digest, image) is None


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_a_limit_of_the_file_size_is_one_clear_error_and_leaves_nothing(tmp_path, write_image, suffix):
    image = read_image(write_image(tmp_path / "in" / "image.nii", values=np.zeros((40, 40, 40), np.int16)))
    labels = np.random.default_rng(0).integers(0, 200, (40, 40, 40))
    (tmp_path / "out").mkdir()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(WriteFailed, match="ulimit -f"):
            write_segmentation(tmp_path / "out" / f"out{suffix}", labels, image, NAMES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_folder_is_said(tmp_path, write_image):
    image = read_image(write_image(tmp_path / "image.nii"))
    with pytest.raises(WriteFailed, match="No such file or directory"):
        write_segmentation(tmp_path / "none" / "out.nii", some_labels(image), image, NAMES)


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_a_byte_that_changes_on_its_way_to_the_disk_is_found(tmp_path, write_image, suffix, monkeypatch):
    """Between writing and reading back, as failing memory or a failing disk would do it."""
    from medmamba.inference.writing import segmentation

    image = read_image(write_image(tmp_path / "image.nii"))

    def flip_last_voxels(temporary: str) -> None:
        data = bytearray(Path(temporary).read_bytes())
        data[-12] ^= 0x10
        Path(temporary).write_bytes(data)

    monkeypatch.setattr(segmentation, "_forget", flip_last_voxels)
    with pytest.raises(WriteFailed) as caught:
        write_segmentation(tmp_path / f"out{suffix}", some_labels(image), image, NAMES)
    assert caught.value.code == "not-equal"
    assert [path.name for path in tmp_path.iterdir()] == ["image.nii"]


def test_a_changed_geometry_is_found(tmp_path, write_image, monkeypatch):
    from medmamba.inference.writing import segmentation

    image = read_image(write_image(tmp_path / "image.nii"))

    def move(temporary: str) -> None:
        data = bytearray(Path(temporary).read_bytes())
        data[280:284] = struct.pack("<f", 9.0)  # srow_x[0]
        Path(temporary).write_bytes(data)

    monkeypatch.setattr(segmentation, "_forget", move)
    with pytest.raises(WriteFailed, match="another geometry"):
        write_segmentation(tmp_path / "out.nii", some_labels(image), image, NAMES)
    assert not (tmp_path / "out.nii").exists()


def test_a_file_verifies_until_something_happens_to_it(tmp_path, write_image, affine):
    image = read_image(write_image(tmp_path / "image.nii"))
    path = tmp_path / "out.nii.gz"
    digest = write_segmentation(path, some_labels(image), image, NAMES)
    assert verify_segmentation(path, digest) is None
    assert verify_segmentation(path, digest, image) is None
    moved = affine.copy()
    moved[0, 3] += 1
    other = read_image(write_image(tmp_path / "moved.nii", at=moved))
    assert "1 mm away" in verify_segmentation(path, digest, other)
    path.write_bytes(path.read_bytes()[:-20])
    assert "changed" in verify_segmentation(path, digest)
    path.unlink()
    assert "missing" in verify_segmentation(path, digest)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.nii.gz", ".nii.gz"), ("A.NII", ".nii"), ("a.b.mha", ".mha"), ("a.mhd", None), ("folder", None)],
)
def test_the_suffix_says_the_format(name, suffix):
    assert suffix_of(name) == suffix


def test_a_name_without_a_format_is_an_error_of_the_caller(tmp_path, write_image):
    image = read_image(write_image(tmp_path / "image.nii"))
    with pytest.raises(ValueError, match="ends with none of"):
        write_segmentation(tmp_path / "out.hdr", some_labels(image), image, NAMES)
