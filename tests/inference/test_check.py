"""``medmamba check``: which files make a case, what is found, and what the command says and returns."""

from __future__ import annotations

import gzip
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from medmamba import cli
from medmamba.inference.check import CaseReport, Finding, case_report, check_cases, examine, find_cases
from medmamba.inference.check.overlay import placed
from medmamba.inference.reading import Image, read_image


def touch(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("names", "channels", "expected"),
    [
        (["a.nii.gz", "b.mha", "c.nrrd"], None, {"a": "", "b": "", "c": ""}),
        (["a_0000.nii.gz", "b_0000.nii.gz"], None, {"a": "", "b": ""}),
        (["a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"], None, {"a": "", "b": ""}),
        (["a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz"], 2, {"a": "", "b": "MM-IO-060"}),
        (["a_0000.nii.gz", "a_0001.nii.gz", "b_0001.nii.gz"], None, {"a": "", "b": "MM-IO-060"}),
        (["a_0000.nii.gz", "a_0002.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"], 2, {"a": "MM-IO-060", "b": ""}),
        (["a_0000.nii.gz", "a_0001.nii.gz"], 1, {"a": "MM-IO-060"}),
        (["a.nii.gz"], 2, {"a": "MM-IO-060"}),
        (["scan_2021.nii.gz", "scan_2022.nii.gz"], None, {"scan_2021": "", "scan_2022": ""}),
        (["scan_2021_0000.nii.gz", "scan_2022_0000.nii.gz"], None, {"scan_2021": "", "scan_2022": ""}),
        (["a.nii", "a.nii.gz"], None, {"a": "MM-IO-062"}),
        (["a.nii", "a_0000.nii"], None, {"a": "MM-IO-062"}),
        (["a.mha", "A.mha"], None, {"a": "MM-IO-062", "A": "MM-IO-062"}),
        (["\u00e9.nii", "e\u0301.nii"], None, {"\u00e9": "MM-IO-062", "e\u0301": "MM-IO-062"}),
        (["a.mhd", "a.raw", ".hidden.nii", "._a.nii.gz", "notes.txt", ".nii"], None, {"a": ""}),
        (["a.nii", "below/b.nii"], None, {"a": ""}),
        (["A.NII.GZ"], None, {"A": ""}),
        (["a.nii", "b/1.dcm"], None, {"a": "", "b": ""}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_names_make_cases(tmp_path, names, channels, expected):
    touch(tmp_path, names)
    found = find_cases(tmp_path, channels)
    assert {case.id: case.problem.id if case.problem else "" for case in found.cases} == expected


def test_channels_come_in_their_order_and_what_is_no_image_is_named(tmp_path):
    touch(tmp_path, [*(f"a_{k:04}.nii.gz" for k in (2, 0, 1)), "notes.txt"])
    found = find_cases(tmp_path)
    assert [path.name for path in found.cases[0].files] == [f"a_{k:04}.nii.gz" for k in range(3)]
    assert found.ignored == ("notes.txt",)


def test_a_refusal_of_channels_lists_found_and_expected_names(tmp_path):
    touch(tmp_path, ["a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"])
    (case, _) = find_cases(tmp_path, 2).cases
    assert "a_0000.nii.gz, a_0001.nii.gz" in case.problem.text
    assert "found 1 (a_0000.nii.gz)" in case.problem.text


def test_a_folder_of_slices_is_one_case(odd_images):
    (case,) = find_cases(odd_images / "dicom_STS_025_MR_T1").cases
    assert case.files == (odd_images / "dicom_STS_025_MR_T1",)
    assert examine(case).status == "ok"


def test_a_report_says_what_the_image_is(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii.gz", shape_xyz=(9, 10, 11), spacing=2.0)
    report = examine(path)
    values = read_image(path).values
    assert (report.status, report.findings) == ("ok", ())
    assert (report.shape, report.spacing_mm, report.extent_mm) == ((11, 10, 9), (2, 2, 2), (22, 20, 18))
    assert report.axes == "RAS"
    (channel,) = report.channels
    assert (channel.low, channel.high) == (values.min(), values.max())
    assert channel.percentiles == tuple(np.percentile(values, [0.5, 50, 99.5]))


def test_copies_are_recognised_across_formats_and_byte_orders(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii.gz")
    values = read_image(path).values
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(tmp_path / "b.mha"))
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4), header), tmp_path / "c.nii")
    write_nifti(tmp_path / "d.nii", seed=1)
    a, b, c, d = check_cases(find_cases(tmp_path).cases)
    assert [finding.id for finding in a.findings + d.findings] == []
    for copy in (b, c):
        assert "MM-IO-090" in [finding.id for finding in copy.findings]
        assert "a.nii.gz of case a" in copy.findings[-1].text
        assert copy.status == "noted"


def broken_link(folder: Path, write: Callable[..., Path]) -> Path:
    (folder / "a.nii").symlink_to("nothing.nii")
    return folder / "a.nii"


def wrong_channels(folder: Path, write: Callable[..., Path]) -> Path:
    write(folder / "a_0000.nii")
    write(folder / "a_0002.nii")
    return folder


def other_size(folder: Path, write: Callable[..., Path]) -> Path:
    write(folder / "a_0000.nii")
    write(folder / "a_0001.nii", seed=1, shape_xyz=(9, 10, 12))
    return folder


def other_spacing(folder: Path, write: Callable[..., Path]) -> Path:
    write(folder / "a_0000.nii")
    write(folder / "a_0001.nii", seed=1, spacing=2.3)
    return folder


def two_formats(folder: Path, write: Callable[..., Path]) -> Path:
    write(folder / "a.nii")
    write(folder / "a.nii.gz")
    return folder


def one_image_twice(folder: Path, write: Callable[..., Path]) -> Path:
    write(folder / "a_0000.nii")
    write(folder / "a_0001.nii")
    return folder


def labelled(change: Callable[[Path], object]) -> Callable[..., Path]:
    def build(folder: Path, write: Callable[..., Path]) -> Path:
        write(folder / "a_0000.nii")
        write_label(folder / "labels" / "a.nii")
        change(folder / "labels" / "a.nii")
        return folder

    build.__name__ = change.__name__
    return build


def write_label(path: Path, values: np.ndarray | None = None, shift_mm: float = 0.0, spacing: float = 2.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.indices((9, 10, 11)).sum(axis=0) % 3
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = (-20 + shift_mm, 7, 100)
    values = values if values.dtype.kind == "f" else values.astype(np.uint8)
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def good(path: Path) -> None:
    return


def missing(path: Path) -> None:
    path.rename(path.with_name("b.nii"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-99])


def broken_label_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing.nii")


def of_other_size(path: Path) -> None:
    write_label(path, np.ones((9, 10, 12), np.uint8))


def of_other_spacing(path: Path) -> None:
    write_label(path, spacing=2.1)


def shifted(path: Path) -> None:
    write_label(path, shift_mm=3.0)


def shifted_by_little(path: Path) -> None:
    write_label(path, shift_mm=0.5)


def background(path: Path) -> None:
    write_label(path, np.zeros((9, 10, 11), np.uint8))


def smoothed(path: Path) -> None:
    write_label(path, np.full((9, 10, 11), 0.5, np.float32))


def negative(path: Path) -> None:
    write_label(path, np.full((9, 10, 11), -1.0, np.float32))


def undefined(path: Path) -> None:
    write_label(path, np.full((9, 10, 11), np.nan, np.float32))


def as_floats(path: Path) -> None:
    write_label(path, np.ones((9, 10, 11), np.float32))


LABELS = [
    (good, None),
    (as_floats, None),
    (shifted_by_little, None),
    (missing, "MM-IO-065"),
    (truncated, "MM-IO-004"),
    (broken_label_link, "MM-IO-001"),
    (of_other_size, "MM-IO-066"),
    (of_other_spacing, "MM-IO-066"),
    (shifted, "MM-IO-066"),
    (background, "MM-IO-093"),
    (smoothed, "MM-IO-067"),
    (negative, "MM-IO-067"),
    (undefined, "MM-IO-067"),
]


@pytest.mark.parametrize(("change", "identifier"), LABELS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_label_map_is_checked_with_its_image(tmp_path, write_nifti, capsys, change, identifier):
    folder = labelled(change)(tmp_path, write_nifti)
    is_refused = identifier is not None and identifier != "MM-IO-093"
    assert cli.main(["check", str(folder), "--labels", str(folder / "labels")]) == (4 if is_refused else 0)
    record = json.loads(capsys.readouterr().out)
    assert [finding["id"] for finding in record["findings"]] == [identifier] * (identifier is not None)


def test_a_shift_of_labels_can_be_allowed_and_another_grid_cannot(tmp_path, write_nifti, capsys):
    folder = labelled(shifted)(tmp_path, write_nifti)
    command = ["check", str(folder), "--labels", str(folder / "labels"), "--allow-shift"]
    assert cli.main(command) == 0
    assert [finding["id"] for finding in json.loads(capsys.readouterr().out)["findings"]] == ["MM-IO-092"]
    of_other_size(folder / "labels" / "a.nii")
    assert cli.main(command) == 4


@pytest.mark.parametrize(
    ("change", "drawn"),
    [(good, set()), (shifted, {"a_by_header.png", "a_by_array.png"}), (of_other_size, {"a_by_header.png"})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_label_maps_on_another_grid_are_drawn(tmp_path, write_nifti, change, drawn):
    folder = labelled(change)(tmp_path, write_nifti)
    pictures = tmp_path / "pictures"
    cli.main(["check", str(folder), "--labels", str(folder / "labels"), "--overlays", str(pictures)])
    assert {path.name for path in pictures.iterdir()} == drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())


def test_overlays_need_labels(tmp_path, write_nifti, capsys):
    folder = labelled(good)(tmp_path, write_nifti)
    assert cli.main(["check", str(folder), "--overlays", str(tmp_path / "pictures")]) == 2
    assert "say --labels" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(5))
def test_a_label_map_is_placed_where_its_header_puts_it(seed):
    draw = np.random.default_rng(seed)
    shapes = [tuple(int(size) for size in draw.integers(1, 7, 3)) for _ in range(2)]
    affines = []
    for _ in shapes:
        turn = np.linalg.qr(draw.normal(size=(3, 3)))[0] @ np.diag(draw.uniform(0.5, 3, 3))
        affines.append(np.vstack([np.column_stack([turn, draw.normal(size=3)]), [0, 0, 0, 1]]))
    image, label = (
        Image(draw.integers(1, 5, shape).astype(np.uint8), affine)
        for shape, affine in zip(shapes, affines, strict=True)
    )
    result = placed(label, image)
    assert result.shape == image.values.shape
    assert result.dtype == np.uint8
    for d, h, w in np.ndindex(*image.values.shape):
        world = image.affine @ [w, h, d, 1]
        position = (np.linalg.inv(label.affine) @ world)[:3][::-1]
        nearest = tuple(int(value) for value in np.floor(position + 0.5))
        near_a_border = np.any(np.abs(position - np.floor(position) - 0.5) < 1e-6)
        inside = all(0 <= value < size for value, size in zip(nearest, label.values.shape, strict=True))
        if not near_a_border:
            assert result[d, h, w] == (label.values[nearest] if inside else 0)


def test_labels_without_an_image_and_labels_that_clash_are_named(tmp_path, write_nifti, capsys):
    folder = labelled(good)(tmp_path, write_nifti)
    write_label(folder / "labels" / "b.nii")
    command = ["check", str(folder), "--labels", str(folder / "labels")]
    assert cli.main(command) == 0
    assert "1 label maps without an image: b" in capsys.readouterr().err
    write_label(folder / "labels" / "a.nii.gz")
    assert cli.main(command) == 2
    assert "a.nii, a.nii.gz" in capsys.readouterr().err


def no_memory(folder: Path, write: Callable[..., Path]) -> Path:
    return write(folder / "no memory.nii")


def bug(folder: Path, write: Callable[..., Path]) -> Path:
    return write(folder / "bug.nii")


PROVOKED = [
    ("MM-IO-001", broken_link),
    ("MM-IO-060", wrong_channels),
    ("MM-IO-061", other_size),
    ("MM-IO-061", other_spacing),
    ("MM-IO-062", two_formats),
    ("MM-IO-063", no_memory),
    ("MM-IO-064", bug),
    ("MM-IO-090", one_image_twice),
]


@pytest.mark.parametrize(("identifier", "build"), PROVOKED, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_wrong_with_a_case_has_an_id(tmp_path, write_nifti, monkeypatch, identifier, build):
    def read(path, **arguments):
        if path.name == "no memory.nii":
            raise MemoryError
        if path.name == "bug.nii":
            raise KeyError("nothing")
        return read_image(path, **arguments)

    monkeypatch.setattr(case_report, "read_image", read)
    found = find_cases(build(tmp_path, write_nifti))
    assert next(f.id for report in check_cases(found.cases) for f in report.findings) == identifier


def test_every_message_about_cases_is_provoked(ids_in):
    of_labels = {identifier for _, identifier in LABELS if identifier} - {"MM-IO-004"}  # of the reader
    assert {identifier for identifier, _ in PROVOKED} | of_labels | {"MM-IO-092"} == ids_in("check")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii")
    path.chmod(0)
    assert [finding.id for finding in examine(path).findings] == ["MM-IO-001"]


def test_one_channel_is_in_memory_at_a_time(tmp_path, write_nifti, monkeypatch):
    for k in range(3):
        write_nifti(tmp_path / f"a_{k:04}.nii", seed=k)
    alive: list[weakref.ref] = []

    def read(path, **arguments):
        assert all(reference() is None for reference in alive)
        image = read_image(path, **arguments)
        alive.append(weakref.ref(image.values))
        return image

    monkeypatch.setattr(case_report, "read_image", read)
    (report,) = check_cases(find_cases(tmp_path).cases)
    assert report.status == "ok"
    assert len(alive) == 3


def test_further_checks_see_the_report_of_cases_that_can_be_read(tmp_path, write_nifti):
    write_nifti(tmp_path / "a.nii")
    write_nifti(tmp_path / "b.nii").write_bytes(b"")
    seen = []

    def check(report: CaseReport) -> list[Finding]:
        seen.append(report.case)
        return [Finding("XX-001", "fingerprint", f"spacing of {report.spacing_mm}", refuses=True)]

    a, b = (examine(case, checks=[check]) for case in find_cases(tmp_path).cases)
    assert seen == ["a"]
    assert [finding.id for finding in a.findings] == ["XX-001"]
    assert a.status == "refused"
    assert [finding.id for finding in b.findings] == ["MM-IO-003"]


@pytest.fixture
def ward(tmp_path, write_nifti) -> Path:
    """Images as they come: good, cut, changed, 4D, twice the same id, in metres without saying so."""
    folder = tmp_path / "ward"
    for seed, name in enumerate(["good", "cut", "flipped", "in two formats"]):
        write_nifti(folder / f"{name}.nii.gz", seed=seed)
    write_nifti(folder / "in two formats.nii", seed=3)
    content = (folder / "cut.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    content = bytearray((folder / "flipped.nii.gz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "flipped.nii.gz").write_bytes(content)
    write_nifti(folder / "series.nii.gz", seed=5, shape_xyz=(9, 10, 11, 4))
    metres = bytearray(gzip.decompress(write_nifti(folder / "metres.nii.gz", seed=6).read_bytes()))
    metres[123] = 1
    (folder / "metres.nii.gz").write_bytes(gzip.compress(bytes(metres)))
    (folder / "notes.txt").write_text("from the ward")
    return folder


EXPECTED = {
    "cut": ("refused", "MM-IO-004"),
    "flipped": ("refused", "MM-IO-005"),
    "good": ("ok", None),
    "in two formats": ("refused", "MM-IO-062"),
    "metres": ("noted", "MM-IO-082"),
    "series": ("refused", "MM-IO-023"),
}


def test_a_folder_is_checked_case_by_case_as_json_lines(ward, capsys):
    assert cli.main(["check", str(ward)]) == 3
    output = capsys.readouterr()
    records = [json.loads(line) for line in output.out.splitlines()]
    found = {record["case"]: record for record in records}
    assert len(records) == 7
    for case, (status, identifier) in EXPECTED.items():
        assert found[case]["status"] == status
        assert [finding["id"] for finding in found[case]["findings"]] == [identifier] * (identifier is not None)
    assert output.err.splitlines() == [
        "1 no image of a format that is read: notes.txt",
        "7 cases: 1 ok, 1 noted, 1 checksum, 2 duplicate-id, 1 not-3d, 1 truncated",
    ]


def test_on_a_terminal_it_is_a_table(ward, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["check", str(ward)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "case status voxels (x y z) spacing mm across mm axes values"
    assert any(line.startswith("good ") and "9 10 11" in line and "2 2 2" in line and "RAS" in line for line in lines)
    assert any(line.startswith("    MM-IO-004 truncated: ") for line in lines)


@pytest.mark.parametrize(("options", "is_json"), [(["--json"], True), (["--table"], False)])
def test_the_form_can_be_chosen(ward, capsys, monkeypatch, options, is_json):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_json)
    cli.main(["check", str(ward), *options])
    assert capsys.readouterr().out.startswith("{") == is_json


def test_the_exit_code_says_whether_all_some_or_none_can_be_predicted(tmp_path, write_nifti, capsys):
    write_nifti(tmp_path / "a.nii")
    assert cli.main(["check", str(tmp_path)]) == 0
    write_nifti(tmp_path / "b.nii", seed=1).write_bytes(b"")
    assert cli.main(["check", str(tmp_path)]) == 3
    (tmp_path / "a.nii").unlink()
    assert cli.main(["check", str(tmp_path)]) == 4
    (tmp_path / "b.nii").unlink()
    assert cli.main(["check", str(tmp_path)]) == 2
    assert cli.main(["check", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_options_reach_the_reader(tmp_path, write_nifti, capsys):
    def status(*options: str) -> str:
        cli.main(["check", str(tmp_path), *options])
        return json.loads(capsys.readouterr().out)["status"]

    path = write_nifti(tmp_path / "a.nii", shape_xyz=(9, 10, 11, 4))
    assert (status(), status("--volume", "3"), status("--volume", "4")) == ("refused", "noted", "refused")
    values = np.arange(990, dtype=np.int32).reshape(9, 10, 11) * 100
    image = nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0]))
    nibabel.save(image, path)
    assert (status(), status("--ct"), status("--ct", "--force")) == ("ok", "refused", "noted")
    assert (status("--channels", "1"), status("--channels", "2")) == ("ok", "refused")


@pytest.mark.parametrize("name", [b"\xff\xfe.nii", b"\x1b[31mred\n.nii", "患者 1.nii".encode()])
def test_names_of_any_bytes_are_reported(tmp_path, write_nifti, capsys, name):
    path = write_nifti(tmp_path / "a.nii")
    path.rename(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    assert cli.main(["check", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert os.fsencode(record["case"]) == name[:-4]
    assert cli.main(["check", str(tmp_path), "--table"]) == 0
    table = capsys.readouterr().out
    table.encode()
    assert "\x1b" not in table
    assert len(table.splitlines()) == 2


def test_one_file_can_be_checked(tmp_path, write_nifti, capsys):
    path = write_nifti(tmp_path / "a_0000.nii")
    assert cli.main(["check", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["case"] == "a"
