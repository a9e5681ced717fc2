"""``Image.header``: enough to write the same geometry again."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmamba.inference.reading import Header, Image, read_image


def header_from(facts: Header) -> nibabel.Nifti1Header:
    """A header with the geometry of ``facts`` alone."""
    header = nibabel.Nifti1Header() if facts.version == 1 else nibabel.Nifti2Header()
    header["pixdim"], header["xyzt_units"] = facts.pixdim, facts.xyzt_units
    header["sform_code"], header["qform_code"] = facts.sform_code, facts.qform_code
    for axis, row, offset in zip("xyz", facts.sform, facts.qoffset, strict=True):
        header[f"srow_{axis}"], header[f"qoffset_{axis}"] = row, offset
    for part, value in zip("bcd", facts.quaternion, strict=True):
        header[f"quatern_{part}"] = value
    return header


GEOMETRY = ("pixdim", "xyzt_units", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z")
QFORM = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    codes=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    kind=st.sampled_from([nibabel.Nifti1Header, nibabel.Nifti2Header]),
    order=st.sampled_from("<>"),
)
def test_the_geometry_of_a_nifti_can_be_written_again_to_the_last_bit(tmp_path, angles, codes, kind, order):
    header = kind(endianness=order)
    affine = np.eye(4)
    affine[:3, :3] = nibabel.eulerangles.euler2mat(*angles) * (0.7421875, 1.1, 3.3)
    affine[:3, 3] = (-170.3, 12.7, 1e3 / 3)
    header.set_data_shape((4, 5, 6))
    header.set_data_dtype(np.int16)
    header.set_zooms((0.7421875, 1.1, 3.3))
    header.set_sform(affine, codes[0])
    header.set_qform(affine, codes[1])
    header.set_xyzt_units("mm", "sec")
    header["magic"] = b"n+1" if kind is nibabel.Nifti1Header else b"n+2\0\r\n\x1a\n"
    header["vox_offset"] = header.sizeof_hdr + 4
    (tmp_path / "image.nii").write_bytes(header.binaryblock + bytes(4 + 240))
    facts = read_image(tmp_path / "image.nii").header
    assert facts.kind == "nifti"
    again = header_from(facts)
    for name in (*GEOMETRY, *QFORM):
        assert np.array_equal(again[name], header[name], equal_nan=True), name


@pytest.mark.parametrize(("suffix", "kind"), [(".mha", "meta"), (".mhd", "meta"), (".nrrd", "nrrd"), (".nhdr", "nrrd")])
def test_the_geometry_of_other_formats_can_be_written_again(tmp_path, suffix, kind):
    image = SimpleITK.GetImageFromArray(np.ones((4, 5, 6), np.int16))
    image.SetSpacing((0.7421875, 1.1, 3.3))
    image.SetOrigin((-170.3, 12.7, 1e3 / 3))
    image.SetDirection(tuple(nibabel.eulerangles.euler2mat(0.1, 0.2, 0.3).ravel()))
    SimpleITK.WriteImage(image, str(tmp_path / f"image{suffix}"))
    expected = SimpleITK.ReadImage(str(tmp_path / f"image{suffix}"))
    facts = read_image(tmp_path / f"image{suffix}").header
    assert facts.kind == kind
    assert facts.direction == expected.GetDirection()
    assert facts.origin == expected.GetOrigin()
    assert facts.spacing == expected.GetSpacing()
    assert (facts.version, facts.pixdim, facts.sform) == (0, (), ())


def test_a_dicom_series_says_how_it_lies(odd_images):
    image = read_image(odd_images / "dicom_STS_025_MR_T1")
    steps = np.reshape(image.header.direction, (3, 3)) * image.header.spacing
    assert image.header.kind == "dicom"
    assert np.allclose(np.diag([-1, -1, 1]) @ steps, image.affine[:3, :3])
    assert np.allclose(np.diag([-1, -1, 1]) @ image.header.origin, image.affine[:3, 3])


def test_an_image_of_memory_has_no_header():
    assert Image(np.zeros((2, 3, 4)), np.eye(4)).header == Header()
    assert Header().kind == "array"


def test_what_the_header_says_is_kept_where_another_form_counts(tmp_path, write_nifti):
    content = bytearray(write_nifti(tmp_path / "image.nii").read_bytes())
    content[76:92] = np.array([1, 0, -3, np.nan], np.float32).tobytes()  # pixdim
    (tmp_path / "image.nii").write_bytes(content)
    image = read_image(tmp_path / "image.nii")
    assert image.spacing_mm == (2, 2, 2)
    assert image.header.pixdim[1:3] == (0, -3)
    assert np.isnan(image.header.pixdim[3])
