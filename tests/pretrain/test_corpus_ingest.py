"""`medmamba pretrain ingest` from folders to a store: every source ends with a status and a reason."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from medmamba import cli
from medmamba_pretrain.corpus.store import MANIFEST, Store
from medmamba_pretrain.corpus.summary import verify
from medmamba_pretrain.corpus.volume import open_volume

COARSE = ("--spacing", "3", "2.5", "2", "--jobs", "1")


def ingest(*arguments: object) -> int:
    return cli.main(["pretrain", "ingest", *map(str, arguments), *COARSE])


def statuses(store: Path) -> dict[str, tuple[str, str]]:
    return {key: (record.status, record.code) for key, record in Store(store).records.items()}


def accepted(store: Path) -> set[str]:
    return {record.source for record in Store(store).accepted.values()}


@pytest.fixture
def inputs(tmp_path, write_ct) -> Path:
    """Three different CTs."""
    for seed, name in enumerate(("a", "b", "c")):
        write_ct(tmp_path / "in" / "images" / f"{name}.nii.gz", seed)
    return tmp_path / "in" / "images"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "store"


def test_the_corrupted_set_ends_in_the_manifest_and_the_run_completes(tmp_path, write_ct, ct, affine, out):
    folder = tmp_path / "in" / "set"
    good = write_ct(folder / "good.nii.gz")
    content = good.read_bytes()
    (folder / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (folder / "flipped.nii.gz").write_bytes(flipped)
    (folder / "empty.nii.gz").touch()
    write_ct(
        folder / "sheared.nii.gz", at=affine @ np.array([[1, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    )
    write_ct(folder / "series.nii.gz", values=np.stack([ct, ct], -1))
    write_ct(folder / "nan.nii.gz", values=np.where(np.arange(ct.size).reshape(ct.shape) == 7, np.nan, ct).astype("f4"))
    write_ct(folder / "scaled.nii.gz", values=((ct + 1024) / 3000).astype(np.float32))
    write_ct(folder / "labels.nii.gz", values=(ct > -500).astype(np.uint8))
    (folder / "scan.mnc").write_bytes(b"CDF")
    (folder / "cases.zip").write_bytes(b"PK")
    (folder / "readme.txt").write_text("no image")
    (folder / "._good.nii.gz").write_bytes(b"of a file system")
    assert ingest(folder, "--out", out) == 0
    assert {Path(key).name: status for key, status in statuses(out).items()} == {
        "good.nii.gz": ("accepted", ""),
        "cut.nii.gz": ("rejected", "truncated"),
        "flipped.nii.gz": ("rejected", "checksum"),
        "empty.nii.gz": ("rejected", "empty"),
        "sheared.nii.gz": ("rejected", "sheared"),
        "series.nii.gz": ("rejected", "not-3d"),
        "nan.nii.gz": ("rejected", "not-finite"),
        "scaled.nii.gz": ("rejected", "not-hu"),
        "labels.nii.gz": ("rejected", "label-map"),
        "scan.mnc": ("rejected", "format"),
        "cases.zip": ("rejected", "format"),
    }
    assert all(record.reason for record in Store(out).records.values() if record.status != "accepted")


def test_odd_real_images_and_a_scan_that_is_there_twice(odd_images, tmp_path, out):
    holed = tmp_path / "holed"
    shutil.copytree(odd_images / "dicom_STS_025_MR_T1", holed)
    (holed / "000011.dcm").unlink()
    assert ingest(f"odd={odd_images}", holed, "--modality", "mr", "--out", out) == 0
    found = {Path(key).name: status for key, status in statuses(out).items()}
    assert found == {
        "STS_025_MR_T1_image.nii.gz": ("accepted", ""),
        "dicom_STS_025_MR_T1": ("duplicate", "copy"),  # the same voxels, from another format
        "STS_025_MR_T1_mask.nii.gz": ("rejected", "label-map"),
        "anatomical.nii": ("accepted", ""),
        "functional.nii": ("rejected", "not-3d"),
        "holed": ("rejected", "missing-slice"),
        "ibsi_orientation.nii.gz": ("accepted", ""),
        "prostate_phantom_subvolume-label.nrrd": ("rejected", "too-small"),
        "resampled_anat_moved.nii": ("rejected", "too-small"),
        "tiny.mnc": ("rejected", "format"),
    }
    dicom = Store(out).records["odd/dicom_STS_025_MR_T1"]
    assert dicom.patient.startswith("dicom-")
    assert "STS" not in dicom.patient


def test_what_is_stored_is_what_was_in_the_file(inputs, out, ct):
    assert ingest(inputs, "--out", out) == 0
    record = Store(out).records["in/images/a.nii.gz"]
    stored = open_volume(out, record.volume).read()
    x, y, z = np.rint(np.linalg.solve(np.diag([2, 2.5, 3]), np.array(record.affine)[:3, 3] - (-20, 7, 100))).astype(int)
    d, h, w = record.shape
    assert np.array_equal(stored, ct.clip(-1024, 3071).T[z : z + d, y : y + h, x : x + w])
    assert record.source_axes == "RAS"
    assert record.patient == "in/images/a"


def test_the_same_volume_in_two_folders_and_formats_is_stored_once(inputs, tmp_path, out):
    other = tmp_path / "other" / "set"
    other.mkdir(parents=True)
    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(inputs / "b.nii.gz")), "PIR")
    SimpleITK.WriteImage(image, str(other / "renamed.mha"), useCompression=True)
    assert ingest(inputs, other, "--out", out) == 0
    assert statuses(out)["other/set/renamed.mha"] == ("duplicate", "copy")
    assert Store(out).records["other/set/renamed.mha"].reason == "same content as in/images/b.nii.gz"
    assert len(list(out.glob("volumes/*/*/*"))) == 3


def test_a_second_run_reads_nothing_and_a_changed_file_again(inputs, out, write_ct, capsys):
    assert ingest(inputs, "--out", out) == 0
    before = (out / MANIFEST).read_bytes()
    assert ingest(inputs, "--out", out) == 0
    assert (out / MANIFEST).read_bytes() == before
    assert "3 images were done already" in capsys.readouterr().out
    old = Store(out).records["in/images/a.nii.gz"].volume
    write_ct(inputs / "a.nii.gz", seed=9)
    assert ingest(inputs, "--out", out) == 0
    assert Store(out).records["in/images/a.nii.gz"].volume != old
    assert all(not wrong for _, wrong in verify(Store(out)))  # the old volume is gone


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_a_lost_volume_is_made_again(inputs, out, damage):
    assert ingest(inputs, "--out", out) == 0
    path = next(out.glob("volumes/*/*/*.b2nd"))
    path.unlink() if damage == "remove" else path.write_bytes(path.read_bytes()[:100])
    assert ingest(inputs, "--out", out) == 0
    assert [wrong for _, wrong in verify(Store(out))] == [""] * 3


def test_other_settings_and_other_inputs_of_one_name_are_refused(inputs, out, tmp_path):
    assert ingest(inputs, "--out", out) == 0
    assert ingest(inputs, "--out", out, "--modality", "mr") == 2
    shutil.copytree(inputs, tmp_path / "more" / "in" / "images")
    assert ingest(inputs, tmp_path / "more" / "in" / "images", "--out", out) == 2
    assert ingest(inputs, f"more={tmp_path / 'more'}", "--out", out) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spacing", "1", "2"], "one number or three"),
        (["--spacing", "0"], "from 0.1 to 20"),
        (["--patients", "regex:("], "no regular expression"),
        (["--patients", "someone"], "known rules"),
        (["--engine", "dask"], "dask"),
        (["--list-exclude", "missing.txt"], "cannot be read"),
        (["--jobs", "0"], "at least 1"),
    ],
)
def test_wrong_usage_is_explained_before_anything_is_read(inputs, out, capsys, arguments, message):
    assert cli.main(["pretrain", "ingest", str(inputs), "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err.lower()
    assert not accepted(out) if out.exists() else True


def test_no_images_and_no_folder_are_errors(tmp_path, out):
    (tmp_path / "empty").mkdir()
    assert ingest(tmp_path / "empty", "--out", out) == 2
    assert ingest(tmp_path / "missing", "--out", out) == 2
    assert not out.exists()


@pytest.mark.parametrize(("good", "bad", "exit_code"), [(1, 0, 0), (1, 1, 3), (0, 1, 4)])
def test_strict_tells_of_rejections_by_the_exit_code(tmp_path, write_ct, out, good, bad, exit_code):
    folder = tmp_path / "in"
    folder.mkdir()
    if good:
        write_ct(folder / "good.nii.gz")
    if bad:
        (folder / "bad.nii.gz").touch()
    assert ingest(folder, "--out", out, "--strict") == exit_code


def test_a_dry_run_writes_nothing(inputs, out, capsys):
    assert ingest(inputs, "--out", out, "--dry-run") == 0
    assert not out.exists()
    assert "3 to read, 0 to exclude, 0 done" in capsys.readouterr().out


def test_the_store_may_lie_among_the_images(inputs):
    for _ in range(2):
        assert ingest(inputs, "--out", inputs / "store") == 0
    assert len(Store(inputs / "store").records) == 3


def copy_in_disguise(source: Path, target: Path) -> None:
    """The same voxels at the same place, in another order of axes, under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.load(source)
    turned = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nibabel.save(nibabel.Nifti1Image(np.asarray(turned.dataobj), turned.affine), target)


@pytest.mark.parametrize("entry", ["a.nii.gz", "in/images/a.nii.gz", "PATH", "in/images/a", "OUTSIDE", "HASH"])
def test_what_is_listed_stays_out_with_its_copies(inputs, tmp_path, out, entry):
    copy_in_disguise(inputs / "a.nii.gz", inputs / "another.nii.gz")
    if entry == "HASH":
        ingest(inputs, "--out", tmp_path / "first")
        entry = str(Store(tmp_path / "first").records["in/images/a.nii.gz"].volume)
    elif entry == "OUTSIDE":
        shutil.copytree(inputs, tmp_path / "imagesTs", ignore=shutil.ignore_patterns("b*", "c*", "another*"))
        entry = str(tmp_path / "imagesTs")
    elif entry == "PATH":
        entry = str(inputs / "a.nii.gz")
    (tmp_path / "list.txt").write_text(f"# test cases\n{entry}  # the first\n\n")
    assert ingest(inputs, "--out", out, "--list-exclude", tmp_path / "list.txt") == 0
    assert accepted(out) == {"in/images/b.nii.gz", "in/images/c.nii.gz"}
    assert {statuses(out)[f"in/images/{name}.nii.gz"][0] for name in ("a", "another")} == {"excluded"}
    assert len(list(out.glob("volumes/*/*/*"))) == 2


def test_a_list_that_comes_later_takes_out_what_is_there_and_an_empty_one_brings_it_back(inputs, tmp_path, out):
    copy_in_disguise(inputs / "c.nii.gz", inputs / "another.nii.gz")
    listed = tmp_path / "list.txt"
    everything = {f"in/images/{name}.nii.gz" for name in ("another", "a", "b")}
    for text, expected in (
        ("", everything),
        ("c.nii.gz", everything - {"in/images/another.nii.gz"}),
        ("c.nii.gz\nb.nii.gz", {"in/images/a.nii.gz"}),
        ("", everything),
    ):
        listed.write_text(text)
        for _ in range(2):  # the second run finds nothing to do
            before = (out / MANIFEST).read_bytes() if out.exists() else b""
            assert ingest(inputs, "--out", out, "--list-exclude", listed) == 0
            assert accepted(out) == expected, text
            assert all(not wrong for _, wrong in verify(Store(out)))
        assert (out / MANIFEST).read_bytes() == before


def test_an_entry_that_matches_nothing_is_named(inputs, tmp_path, out, capsys):
    (tmp_path / "list.txt").write_text("patient_7\n")
    assert ingest(inputs, "--out", out, "--list-exclude", tmp_path / "list.txt") == 0
    assert "1 entries" in (text := capsys.readouterr().out)
    assert "patient_7" in text


def test_a_dicom_patient_can_be_excluded_by_the_name_in_its_files(odd_images, tmp_path, out):
    series = odd_images / "dicom_STS_025_MR_T1"
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(series / "000000.dcm"))
    reader.ReadImageInformation()
    (tmp_path / "list.txt").write_text(reader.GetMetaData("0010|0020").strip())
    assert ingest(series, "--modality", "mr", "--out", out, "--list-exclude", tmp_path / "list.txt") == 0
    assert [status for status, _ in statuses(out).values()] == ["excluded"]


@pytest.mark.parametrize(
    ("rule", "patients"),
    [
        ("file", {"in/p1/s1/ct", "in/p1/s2/ct", "in/p2/s1/ct"}),
        ("folder", {"in/p1/s1", "in/p1/s2", "in/p2/s1"}),
        ("regex:/(p[0-9]+)/", {"p1", "p2"}),
    ],
)
def test_patients_follow_the_rule(tmp_path, write_ct, out, rule, patients):
    for seed, name in enumerate(("p1/s1", "p1/s2", "p2/s1")):
        write_ct(tmp_path / "in" / name / "ct_0000.nii.gz", seed)
    assert ingest(f"in={tmp_path / 'in'}", "--out", out, "--patients", rule) == 0
    assert {record.patient for record in Store(out).accepted.values()} == patients


COMMAND = [sys.executable, "-m", "medmamba.cli", "pretrain", "ingest"]


def test_a_killed_run_continues_and_ends_like_one_that_was_not(tmp_path, write_ct, out):
    folder = tmp_path / "in"
    for seed in range(30):
        write_ct(folder / f"{seed:02}.nii.gz", seed)
    command = [*COMMAND, str(folder), "--out", str(out), *COARSE]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / MANIFEST).exists() or (out / MANIFEST).read_bytes().count(b"\n") < 4:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(Store(out).records)
    assert 3 <= done < 30, "killed too late to show anything"
    # What a kill in the middle of writing leaves behind: half a line, half a volume.
    with (out / MANIFEST).open("ab") as stream:
        stream.write(b'{"source": "in/29.nii.gz", "stamp"')
    half = out / "volumes" / "ab" / "cd" / f".{'0' * 32}.b2nd.xyz.tmp"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half")
    assert ingest(folder, "--out", out) == 0
    assert ingest(folder, "--out", tmp_path / "at_once") == 0
    assert Store(out).records == Store(tmp_path / "at_once").records
    assert [wrong for _, wrong in verify(Store(out))] == [""] * 30
    assert not half.exists()


def test_two_processes_give_the_same_store_as_one(inputs, tmp_path, out):
    copy_in_disguise(inputs / "a.nii.gz", inputs / "z.nii.gz")
    (inputs / "bad.nii.gz").touch()
    assert ingest(inputs, "--out", out) == 0
    two = tmp_path / "two"
    assert cli.main(["pretrain", "ingest", str(inputs), "--out", str(two), *COARSE[:-1], "2"]) == 0
    assert list(Store(two).records.values()) == list(Store(out).records.values())


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is missing: pip install '.[cluster]'")
def test_two_dask_workers_give_the_same_store_as_one_process(inputs, tmp_path, out):
    from dask.distributed import LocalCluster

    copy_in_disguise(inputs / "a.nii.gz", inputs / "z.nii.gz")
    (inputs / "bad.nii.gz").touch()
    assert ingest(inputs, "--out", out) == 0
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        arguments = ["--engine", "dask", "--scheduler", cluster.scheduler_address]
        assert ingest(inputs, "--out", tmp_path / "cluster", *arguments) == 0
    assert list(Store(tmp_path / "cluster").records.values()) == list(Store(out).records.values())


def test_a_folder_that_must_not_be_written_is_named(inputs, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert ingest(inputs, "--out", tmp_path / "file" / "store") == 2
    assert "choose another --out" in capsys.readouterr().err


def test_files_and_folders_without_rights_are_rejected_with_that_reason(inputs, out, monkeypatch):
    """As root, who may read everything, the refusal of the system is played."""
    opened = Path.open

    def refuse(path, *arguments, **keywords):
        if path.name == "b.nii.gz":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    assert ingest(inputs, "--out", out) == 0
    record = Store(out).records["in/images/b.nii.gz"]
    assert (record.status, record.code) == ("rejected", "not-opened")
    assert "Permission denied" in record.reason
    assert len(accepted(out)) == 2
    monkeypatch.undo()
    assert ingest(inputs, "--out", out) == 0  # rights may change without a change of the file
    assert len(accepted(out)) == 3


def test_a_folder_without_rights_is_rejected_with_that_reason(inputs, out, monkeypatch):
    closed = inputs / "closed"
    closed.mkdir()
    scan = os.scandir

    def refuse(path="."):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert ingest(inputs, "--out", out) == 0
    assert statuses(out)["in/images/closed"] == ("rejected", "not-opened")


def test_dicom_is_found_without_suffix_and_a_link_in_a_circle_ends(odd_images, tmp_path, out):
    folder = tmp_path / "in" / "scans"
    for k, path in enumerate(sorted((odd_images / "dicom_STS_025_MR_T1").iterdir())):
        name = "first/IM" if k % 2 else "first/1.2.840."  # both are names that scanners give
        (folder / "first").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{name}{k}")
    (folder / "first" / "notes.txt").write_text("no slice")
    (folder / "first" / "circle").symlink_to(folder)
    (folder / ".hidden").mkdir()
    shutil.copy(odd_images / "anatomical.nii", folder / ".hidden")
    assert ingest(folder, "--modality", "mr", "--out", out) == 0
    assert statuses(out) == {"in/scans/first": ("accepted", "")}


def test_inputs_may_be_single_files(inputs, odd_images, out):
    assert ingest(inputs / "a.nii.gz", f"b={inputs / 'b.nii.gz'}", "--out", out) == 0
    assert accepted(out) == {"images/a.nii.gz", "b"}


def test_one_slice_on_the_list_excludes_its_series(odd_images, tmp_path, out):
    series = odd_images / "dicom_STS_025_MR_T1"
    (tmp_path / "list.txt").write_text(str(series / "000003.dcm"))
    assert ingest(series, "--modality", "mr", "--out", out, "--list-exclude", tmp_path / "list.txt") == 0
    assert list(statuses(out).values()) == [("excluded", "listed")]


def test_a_killed_process_ends_the_run_with_the_remedy(inputs, out, monkeypatch, capsys):
    from medmamba_pretrain.corpus.engine import Engine

    real = Engine.map
    # Every task of the two processes is to end its process, as the system does when memory is short.
    monkeypatch.setattr(Engine, "map", lambda self, function, tasks: real(Engine(jobs=2), os._exit, [9, 9]))
    assert ingest(inputs, "--out", out) == 75
    assert "fewer --jobs" in capsys.readouterr().err


def test_a_full_disk_stops_the_run_and_more_room_lets_it_end(small_disk, tmp_path, write_ct, capsys):
    folder = tmp_path / "in"
    for seed in range(12):
        write_ct(folder / f"{seed:02}.nii.gz", seed)
    (small_disk / "ballast").write_bytes(bytes(120 << 10))
    assert ingest(folder, "--out", small_disk / "store") == 75
    assert "make room" in (error := capsys.readouterr().err)
    assert "internal" not in error
    done = Store(small_disk / "store")
    assert 0 < len(done.records) < 12
    assert [wrong for _, wrong in verify(done)] == [""] * len(done.records)
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    assert ingest(folder, "--out", small_disk / "store") == 0
    assert len(accepted(small_disk / "store")) == 12


def test_a_bug_in_one_image_does_not_end_the_run(inputs, out, monkeypatch):
    from medmamba_pretrain.corpus import work

    def fail(path):
        if path.name == "b.nii.gz":
            raise ZeroDivisionError("a bug")
        return read(path)

    read = work.read_image
    monkeypatch.setattr(work, "read_image", fail)
    assert ingest(inputs, "--out", out) == 0
    assert statuses(out)["in/images/b.nii.gz"] == ("rejected", "internal")
    monkeypatch.undo()
    assert ingest(inputs, "--out", out) == 0  # such a record is not final
    assert statuses(out)["in/images/b.nii.gz"] == ("accepted", "")


def test_corpus_summarises_lists_and_verifies(inputs, out, capsys):
    (inputs / "bad.nii.gz").touch()
    assert ingest(inputs, "--out", out) == 0
    capsys.readouterr()
    assert cli.main(["pretrain", "corpus", str(out), "--rejected", "--verify"]) == 0
    text = capsys.readouterr().out
    assert "3 accepted, 1 rejected" in text
    assert "in/images/bad.nii.gz: empty: the file is empty" in text
    assert "3 of 3 volumes hold what the manifest says" in text
    next(out.glob("volumes/*/*/*.b2nd")).write_bytes(b"")
    assert cli.main(["pretrain", "corpus", str(out), "--verify"]) == 3
    assert cli.main(["pretrain", "corpus", str(inputs)]) == 2


def test_help_of_the_actions_is_light():
    code = (
        "import sys; from medmamba import cli\n"
        "try: cli.main(['pretrain', 'ingest', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'SimpleITK', 'blosc2', 'joblib', 'nibabel', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--list-exclude" in result.stdout
