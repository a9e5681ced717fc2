"""Running a folder: every case for itself, a report, and a second run that trusts only what verifies."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medmamba.command import CommandError
from medmamba.inference.folder import Options, run_folder
from medmamba.inference.folder.messages import MESSAGES
from medmamba.inference.protocol import Prediction
from medmamba.inference.reading import ImageRefused, read_image
from medmamba.inference.writing import names_of, verify_segmentation

CHECKOUT = Path(__file__).resolve().parents[2]


def records(folder: Path, kind: str | None = None, name: str = "report.jsonl") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
    return [line for line in lines if kind in (None, line["record"])]


def last_cases(folder: Path, name: str = "report.jsonl") -> dict[str, dict[str, Any]]:
    return {record["case"]: record for record in records(folder, "case", name)}


def results(folder: Path) -> dict[str, bytes]:
    """Everything under a final name."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name.endswith((".nii.gz", ".nii", ".mha", ".nrrd"))
    }


@pytest.fixture
def run(fake, tmp_path) -> Callable[..., int]:
    """Runs ``tmp_path/in`` into ``tmp_path/out`` and keeps what was said in ``run.said``."""

    def call(predictor: object = None, inputs: Path | None = None, output: Path | None = None, **options: Any) -> int:
        call.said = []
        options.setdefault("say", call.said.append)
        return run_folder(
            inputs or tmp_path / "in", output or tmp_path / "out", predictor or fake.Threshold(), Options(**options)
        )

    return call


def test_five_files_with_one_junk_give_four_outputs_and_exit_code_3(run, five, tmp_path):
    assert run() == 3
    out = tmp_path / "out"
    assert sorted(results(out)) == [f"case_{k}.nii.gz" for k in range(4)]
    cases = last_cases(out)
    assert {name: case["status"] for name, case in cases.items()} == {
        **{f"case_{k}": "done" for k in range(4)},
        "case_9": "refused",
    }
    error = cases["case_9"]["error"]
    assert (error["stage"], error["id"], error["code"]) == ("reading", "MM-IO-008", "format")
    assert "whatever its name says" in error["cause"]
    assert "convert" in error["remedy"]
    for k in range(4):
        case, image = cases[f"case_{k}"], read_image(five / f"case_{k}.nii.gz")
        path = out / f"case_{k}.nii.gz"
        assert verify_segmentation(path, case["output"]["sha256"], image) is None
        np.testing.assert_array_equal(read_image(path).values, image.values > 50)
        assert names_of(path)[1] == "bright"
    (end,) = records(out, "end")
    assert (end["exit_code"], end["done"], end["refused"], end["left"]) == (3, 4, 1, 0)


@pytest.mark.parametrize(("good", "bad", "exit_code"), [(2, 0, 0), (1, 1, 3), (0, 2, 4)])
def test_the_exit_code_says_how_many_failed(run, tmp_path, write_image, good, bad, exit_code):
    for k in range(good):
        write_image(tmp_path / "in" / f"good{k}.nii")
    for k in range(bad):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"bad{k}.nii").write_bytes(b"")
    assert run() == exit_code
    assert run() == exit_code  # what is kept counts as done


def test_every_finished_case_is_said_with_an_estimate_of_the_end(run, five):
    run()
    lines = [line for line in run.said if line.startswith("[")]
    assert [line.partition("]")[0] for line in lines] == [f"[{k}/5" for k in range(1, 6)]
    assert all("ends about" in line for line in lines[:-1])
    assert "ends about" not in lines[-1]
    assert "refused while reading, MM-IO-008 format" in lines[-1]


def test_progress_goes_to_stdout_alone(fake, five, tmp_path, capsys):
    run_folder(five, tmp_path / "out", fake.Threshold())
    printed = capsys.readouterr()
    assert "case_0: done" in printed.out
    assert printed.err == ""


ERRORS = [
    (
        ImageRefused("spacing", "the spacing is 99 mm; resample it", "MM-XX-1"),
        "refused",
        "MM-XX-1",
        "the spacing is 99 mm",
    ),
    (MemoryError(), "failed", "MM-RN-001", "MemoryError"),
    (
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        "failed",
        "MM-RN-002",
        "RuntimeError: CUDA out of memory",
    ),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        "failed",
        "MM-RN-001",
        "RuntimeError: DefaultCPUAllocator",
    ),
    (RuntimeError("Failed to allocate memory for image."), "failed", "MM-RN-001", "RuntimeError: Failed"),
    (RuntimeError("first line\nsecond"), "failed", "MM-RN-003", "RuntimeError: first line"),
    (KeyError("a"), "failed", "MM-RN-003", "KeyError: 'a'"),
    (OSError(5, "Input/output error"), "failed", "MM-RN-003", "OSError: Input/output error"),
]


@pytest.mark.parametrize(("error", "status", "identifier", "cause"), ERRORS, ids=lambda value: str(value)[:20])
def test_an_error_of_one_case_is_a_line_and_the_next_case_follows(
    run, fake, tmp_path, write_image, error, status, identifier, cause
):
    for name in "abc":
        write_image(tmp_path / "in" / f"{name}.nii")

    class FailsOnce(fake.Threshold):
        def predict(self, channels, *, should_stop):
            if self.predicted == 1:
                self.predicted += 1
                raise error
            return super().predict(channels, should_stop=should_stop)

    assert run(FailsOnce()) == 3
    cases = last_cases(tmp_path / "out")
    assert [cases[name]["status"] for name in "abc"] == ["done", status, "done"]
    found = cases["b"]["error"]
    assert (found["stage"], found["id"]) == ("predicting", identifier)
    assert found["cause"].startswith(cause)
    assert found["remedy"]
    assert sorted(results(tmp_path / "out")) == ["a.nii", "c.nii"]


def test_a_line_about_an_unexpected_error_says_where_in_the_code(run, fake, tmp_path, write_image):
    write_image(tmp_path / "in" / "a.nii")

    class Broken(fake.Threshold):
        def predict(self, channels, *, should_stop):
            raise ValueError(f"cannot use {tmp_path}/in/a.nii")

    assert run(Broken()) == 4
    error = last_cases(tmp_path / "out")["a"]["error"]
    assert error["cause"] == "ValueError: cannot use a.nii"
    assert error["frames"][-1].endswith(" predict")
    assert "medmamba.inference.folder.run:" in error["frames"][0]


@pytest.mark.parametrize(
    ("labels", "cause"),
    [
        (np.zeros((3, 3, 3), np.uint8), "labels are (3, 3, 3)"),
        (np.zeros((10, 12, 14), np.float32), "no labels"),
        (np.full((10, 12, 14), 7, np.uint8), "does not have"),
    ],
    ids=["shape", "type", "label"],
)
def test_a_result_that_is_no_segmentation_is_not_written(run, fake, tmp_path, write_image, labels, cause):
    write_image(tmp_path / "in" / "a.nii")

    class Odd(fake.Threshold):
        def predict(self, channels, *, should_stop):
            return Prediction(labels)

    assert run(Odd()) == 4
    error = last_cases(tmp_path / "out")["a"]["error"]
    assert error["id"] == "MM-RN-005"
    assert cause in error["cause"]
    assert results(tmp_path / "out") == {}


def test_facts_that_json_cannot_hold_fail_the_case_and_not_the_run(run, fake, tmp_path, write_image):
    write_image(tmp_path / "in" / "a.nii")

    class Odd(fake.Threshold):
        def predict(self, channels, *, should_stop):
            return Prediction(np.zeros((10, 12, 14), np.uint8), {"seconds": float("nan")})

    assert run(Odd()) == 4
    assert "plain values" in last_cases(tmp_path / "out")["a"]["error"]["cause"]


def test_the_report_has_volumes_empty_labels_and_the_border(run, fake, tmp_path, write_image):
    values = np.zeros((14, 12, 10), np.int16)
    values[0:3, 4:8, 2:7] = 100  # 60 voxels, at the first face of x
    write_image(tmp_path / "in" / "a.nii", values=values, at=np.diag([1.5, 2, 4, 1.0]))
    assert run() == 0
    case = last_cases(tmp_path / "out")["a"]
    assert case["labels"] == {
        "1": {"name": "bright", "voxels": 60, "ml": 0.72, "border": True},
        "2": {"name": "never there", "voxels": 0, "ml": 0.0, "border": False},
    }
    assert case["empty_labels"] == ["never there"]
    assert case["touching_border"] == ["bright"]
    assert case["output"]["shape_xyz"] == [14, 12, 10]
    assert case["output"]["spacing_mm_xyz"] == [1.5, 2.0, 4.0]
    assert case["facts"] == {"tiles": 1}
    assert case["peak_ram_mb"] > 10
    assert set(case["stage_seconds"]) == {"reading", "predicting", "writing"}


def test_notes_of_the_reader_are_in_the_report_with_their_ids(run, tmp_path, write_image):
    image = nibabel.load(write_image(tmp_path / "first.nii"))
    image.set_sform(image.affine, 0)
    image.set_qform(image.affine, 0)
    (tmp_path / "in").mkdir()
    nibabel.save(image, tmp_path / "in" / "a.nii")
    assert run() == 0
    notes = last_cases(tmp_path / "out")["a"]["notes"]
    assert [note["id"] for note in notes if "orientation" in note["text"] or "qform" in note["text"]] == ["MM-IO-080"]
    assert "1 note" in run.said[1]


def test_the_report_tells_nothing_about_machine_and_user(run, five, tmp_path):
    assert run(command=["medmamba", "predict", "-i", str(five), f"--model={tmp_path}/m", "--step", "0.5"]) == 3
    text = (tmp_path / "out" / "report.jsonl").read_text()
    (header,) = records(tmp_path / "out", "run")
    assert header["command"] == ["medmamba", "predict", "-i", "in", "--model=m", "--step", "0.5"]
    assert header["versions"]["medmamba"]
    assert header["machine"]["cores"] >= 1
    assert str(tmp_path) not in text
    for name in {socket.gethostname(), platform.node()}:
        assert f'"{name}"' not in text
    assert str(Path.home()) not in text.replace('"/"', "")


def test_what_is_no_image_is_named_and_left_alone(run, five, tmp_path):
    (five / "notes.txt").write_text("x")
    (five / "more").mkdir()
    (five / "._case_0.nii.gz").write_bytes(b"x")
    run()
    (header,) = records(tmp_path / "out", "run")
    assert header["ignored"] == ["more", "notes.txt"]
    assert any("notes.txt" in line for line in run.said)


def test_a_second_run_keeps_what_verifies_and_does_nothing_else(run, fake, five, tmp_path):
    run()
    before = results(tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.suffix == ".gz"}
    predictor = fake.Threshold()
    assert run(predictor) == 3
    assert predictor.predicted == 0
    assert run.said[:1] == ["checking the results of earlier runs"]
    assert run.said[1] == "5 cases: 4 verified outputs kept, 0 partial removed, 1 to do"
    assert results(tmp_path / "out") == before
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times}


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


CHANGES = {
    "input": lambda folder, write: write(folder / "in" / "case_1.nii.gz", seed=77),
    "damaged output": lambda folder, write: damage(folder / "out" / "case_1.nii.gz"),
    "missing output": lambda folder, write: (folder / "out" / "case_1.nii.gz").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_done_again(run, fake, five, tmp_path, write_image, change):
    run()
    wanted = results(tmp_path / "out")
    CHANGES[change](tmp_path, write_image)
    predictor = fake.Threshold()
    assert run(predictor) == 3
    assert predictor.predicted == 1
    found = results(tmp_path / "out")
    assert {name for name in wanted if wanted[name] != found[name]} == (
        {"case_1.nii.gz"} if change == "input" else set()
    )
    notes = last_cases(tmp_path / "out")["case_1"]["notes"]
    assert [note["id"] for note in notes] == (["MM-RN-020"] if change == "damaged output" else [])


@pytest.mark.parametrize("change", ["model", "settings", "format", "no resume"])
def test_another_model_or_other_settings_do_everything_again(run, fake, five, tmp_path, change):
    run(settings={"step": (0.5, 0.5)})
    predictor = fake.Threshold(id="threshold-2" if change == "model" else "threshold-1")
    run(
        predictor,
        settings={"step": (0.5, 0.75 if change == "settings" else 0.5)},
        file_format=".mha" if change == "format" else None,
        resume=change != "no resume",
    )
    assert predictor.predicted == 4
    again = fake.Threshold(id=predictor.id)
    run(
        again,
        settings={"step": [0.5, 0.75 if change == "settings" else 0.5]},
        file_format=".mha" if change == "format" else None,
    )
    assert again.predicted == 0


def test_a_file_without_a_line_is_done_again(run, fake, five, tmp_path):
    """As a kill between the two leaves it; or a file of somebody else, which gets a note."""
    run()
    path = tmp_path / "out" / "report.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"case_2"' not in line]
    path.write_text("\n".join([*kept, ""]))
    predictor = fake.Threshold()
    run(predictor)
    assert predictor.predicted == 1
    assert [note["id"] for note in last_cases(tmp_path / "out")["case_2"]["notes"]] == ["MM-RN-020"]


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_report_cut_short_is_mended(run, fake, five, tmp_path, cut):
    run()
    path = tmp_path / "out" / "report.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    predictor = fake.Threshold()
    assert run(predictor) == 3
    assert predictor.predicted == 0  # only the line about the end was lost
    assert records(tmp_path / "out", "end")


@pytest.mark.parametrize("content", ["", '{"record": "ru'])
def test_the_beginning_of_a_report_is_no_report_and_no_error(run, five, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.jsonl").write_text(content)
    assert run() == 3
    assert records(tmp_path / "out")[0]["record"] == "run"


@pytest.mark.parametrize(
    "content", ["my notes\n", "my notes", '{"record": "run", "format": "another", "version": 1}\n']
)
def test_a_foreign_file_called_report_is_not_touched(run, five, tmp_path, content):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "report.jsonl"
    path.write_text(content)
    with pytest.raises(CommandError, match="choose another output folder"):
        run()
    assert path.read_text() == content
    assert results(tmp_path / "out") == {}


def test_partial_files_are_removed_and_those_of_others_are_not(run, five, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".case_1.nii.gz.abcd1234.tmp").write_bytes(b"half")
    (tmp_path / "out" / ".other.nii.gz.abcd1234.tmp").write_bytes(b"half")
    run()
    assert not (tmp_path / "out" / ".case_1.nii.gz.abcd1234.tmp").exists()
    assert (tmp_path / "out" / ".other.nii.gz.abcd1234.tmp").exists()
    assert records(tmp_path / "out", "run")[0]["partial_removed"] == 1


def test_a_case_that_a_run_died_of_comes_last_in_the_next(run, fake, tmp_path, write_image):
    for name in "abcd":
        write_image(tmp_path / "in" / f"{name}.nii")
    order = []

    class Dies(fake.Threshold):
        def predict(self, channels, *, should_stop):
            order.append(channels[0].values.mean())
            if len(order) == 2:
                raise SystemExit  # leaves as little behind as a kill does
            return super().predict(channels, should_stop=should_stop)

    with pytest.raises(SystemExit):
        run(Dies())
    assert run() == 0
    assert [line["case"] for line in records(tmp_path / "out", "case")] == ["a", "c", "d", "b"]
    assert [note["id"] for note in last_cases(tmp_path / "out")["b"]["notes"]] == ["MM-RN-021"]


def test_two_runs_into_one_folder_are_refused(run, fake, five, tmp_path):
    class StartsAnother(fake.Threshold):
        def predict(self, channels, *, should_stop):
            with pytest.raises(CommandError, match="another run is writing"):
                run_folder(five, tmp_path / "out", fake.Threshold())
            return super().predict(channels, should_stop=should_stop)

    assert run(StartsAnother()) == 3


def test_parts_run_beside_each_other_but_no_part_twice(run, fake, five, tmp_path):
    class StartsAnother(fake.Threshold):
        def predict(self, channels, *, should_stop):
            options = {"num_parts": 2, "say": lambda line: None}
            for other in (Options(part_id=0, **options), Options(say=options["say"])):
                with pytest.raises(CommandError, match="another run is writing"):
                    run_folder(five, tmp_path / "out", fake.Threshold(), other)
            run_folder(five, tmp_path / "out", fake.Threshold(), Options(part_id=1, **options))
            return super().predict(channels, should_stop=should_stop)

    assert run(StartsAnother(), num_parts=2, part_id=0) == 3
    assert len(results(tmp_path / "out")) == 4


def test_parts_divide_the_cases_as_nnunet_does_and_know_each_others_results(run, fake, tmp_path, write_image):
    for k in range(7):
        write_image(tmp_path / "in" / f"c{k}.nii", seed=k)
    for part in range(3):
        assert run(num_parts=3, part_id=part) == 0
        name = f"report.part-{part}-of-3.jsonl"
        assert sorted(last_cases(tmp_path / "out", name)) == [f"c{k}" for k in range(part, 7, 3)]
        assert records(tmp_path / "out", "run", name)[0]["part"] == {"id": part, "of": 3}
    predictor = fake.Threshold()
    assert run(predictor) == 0
    assert run(predictor, num_parts=2, part_id=1) == 0
    assert predictor.predicted == 0


def test_a_full_disk_ends_the_run_with_one_error_and_more_room_lets_it_go_on(fake, mount_disk, tmp_path, write_image):
    for k in range(3):
        write_image(
            tmp_path / "in" / f"c{k}.nii",
            values=np.random.default_rng(k).integers(0, 101, (60, 60, 60)).astype(np.int16),
        )
    disk = mount_disk("64k")
    said = []
    with pytest.raises(CommandError, match="make room") as caught:
        run_folder(tmp_path / "in", disk, fake.Threshold(), Options(say=said.append, file_format=".nii.gz"))
    assert caught.value.exit_code == 75
    for name, data in results(disk).items():
        record = last_cases(disk)[name.removesuffix(".nii.gz")]
        assert record["output"]["bytes"] == len(data)
    assert [path.name for path in disk.iterdir() if path.name.endswith(".tmp")] == []
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert run_folder(tmp_path / "in", disk, fake.Threshold(), Options(say=said.append, file_format=".nii.gz")) == 0
    assert len(results(disk)) == 3


def test_an_image_that_is_still_being_copied_is_refused(run, tmp_path, write_image):
    path = write_image(tmp_path / "in" / "a.nii")

    def read_while_it_grows(source: Path):
        image = read_image(source)
        with path.open("ab") as stream:
            stream.write(b"more")
        return image

    assert run(read=read_while_it_grows) == 4
    assert last_cases(tmp_path / "out")["a"]["error"]["id"] == "MM-RN-004"


def test_an_image_that_cannot_be_opened_is_refused_by_name(run, tmp_path, write_image):
    write_image(tmp_path / "in" / "a.nii")
    (tmp_path / "in" / "b.nii").symlink_to(tmp_path / "nowhere")
    assert run() == 3
    error = last_cases(tmp_path / "out")["b"]["error"]
    assert (error["id"], error["cause"]) == ("MM-IO-001", "FileNotFoundError: No such file or directory")


@pytest.mark.parametrize("name", ["with space", "übergröße 肝", "semi;colon'quote", "a\udcff", ".".join("abc")])
def test_odd_names_are_names(run, fake, tmp_path, write_image, name):
    path = write_image(tmp_path / "first.nii.gz")
    (tmp_path / "in").mkdir()
    path.rename(tmp_path / "in" / f"{name}.nii.gz")
    assert run() == 0
    assert list(results(tmp_path / "out")) == [f"{name}.nii.gz"]
    assert list(last_cases(tmp_path / "out")) == [name]
    predictor = fake.Threshold()
    assert run(predictor) == 0
    assert predictor.predicted == 0


def test_a_single_file_goes_into_a_single_file_with_a_report_of_its_own(run, tmp_path, write_image):
    path = write_image(tmp_path / "in" / "scan_0000.nii.gz")
    assert run(inputs=path, output=tmp_path / "seg.mha") == 0
    assert run(inputs=path, output=tmp_path / "other.nii.gz") == 0
    assert sorted(item.name for item in tmp_path.iterdir() if item.is_file()) == [
        "other.nii.gz",
        "other.report.jsonl",
        "seg.mha",
        "seg.report.jsonl",
    ]
    assert last_cases(tmp_path, "seg.report.jsonl")["scan"]["output"]["file"] == "seg.mha"


@pytest.mark.parametrize(
    ("source", "file_format", "wanted"),
    [
        ("a.nii.gz", None, "a.nii.gz"),
        ("a.nii", None, "a.nii"),
        ("a.mha", None, "a.mha"),
        ("a.mhd", None, "a.mha"),
        ("a.nrrd", None, "a.nrrd"),
        ("a.nhdr", None, "a.nrrd"),
        ("a_0000.nii", "nii.gz", "a.nii.gz"),
        ("a.nrrd", ".mha", "a.mha"),
    ],
)
def test_outputs_have_the_format_of_their_input_or_the_one_asked_for(
    run, tmp_path, write_image, source, file_format, wanted
):
    import SimpleITK

    (tmp_path / "in").mkdir()
    image = SimpleITK.ReadImage(str(write_image(tmp_path / "first.nii", at=np.diag([1, 2, 3, 1.0]))))
    SimpleITK.WriteImage(image, str(tmp_path / "in" / source))
    assert run(file_format=file_format) == 0
    assert list(results(tmp_path / "out")) == [wanted]


@pytest.mark.parametrize(
    ("inputs", "output", "options", "text"),
    [
        ("in", "in", {}, "holds the images"),
        ("in/a.nii", "in/a.nii", {}, "is an image of this run"),
        ("in/a.nii", "in", {}, "is an image of this run"),
        ("in", "in/../in", {}, "holds the images"),
        ("in", "seg.nii", {}, "2 cases do not go into one file"),
        ("in", "seg.mgz", {}, "is not written"),
        ("in", "in/a.nii.txt", {}, "is not written"),
        ("none", "out", {}, "does not exist"),
        ("empty", "out", {}, "holds no image"),
        ("in", "out", {"file_format": ".mgz"}, "is not written; choose one of"),
        ("in/a.nii", "seg.nii", {"file_format": ".mha"}, "is no .mha"),
        ("in", "out", {"num_parts": 2, "part_id": 2}, "part 2 of 2 does not exist"),
        ("in", "out", {"num_parts": 0}, "does not exist"),
        ("in/a.nii", "seg.nii", {"num_parts": 2}, "parts of a run need an output folder"),
        ("in", "in/a.nii/out", {}, "cannot be made"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(run, tmp_path, write_image, inputs, output, options, text):
    for name in "ab":
        write_image(tmp_path / "in" / f"{name}.nii")
    (tmp_path / "in" / "a.nii.txt").write_text("")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CommandError, match=text) as caught:
        run(inputs=tmp_path / inputs, output=tmp_path / output, **options)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_the_folder_of_the_images_is_that_folder(run, tmp_path, write_image):
    write_image(tmp_path / "in" / "a.nii")
    (tmp_path / "out").symlink_to(tmp_path / "in")
    with pytest.raises(CommandError, match="holds the images"):
        run()


def test_channels_of_a_case_are_read_in_their_order(run, fake, tmp_path, write_image):
    for k in range(2):
        values = np.full((14, 12, 10), 40, np.int16)
        values[:7] += 40 * k
        write_image(tmp_path / "in" / f"a_000{k}.nii.gz", values=values)
    assert run(fake.Threshold(channel_names=("T1", "T2"))) == 0
    case = last_cases(tmp_path / "out")["a"]
    assert [item["file"] for item in case["inputs"]] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert case["labels"]["1"]["voxels"] == 7 * 12 * 10


@pytest.mark.parametrize(
    ("shift", "size", "status"),
    [(0.05, (14, 12, 10), "done"), (1.0, (14, 12, 10), "refused"), (0, (14, 12, 11), "refused")],
)
def test_channels_on_different_grids_are_refused(run, fake, tmp_path, write_image, affine, shift, size, status):
    write_image(tmp_path / "in" / "a_0000.nii")
    moved = affine.copy()
    moved[1, 3] += shift
    write_image(tmp_path / "in" / "a_0001.nii", values=np.zeros(size, np.int16), at=moved)
    run(fake.Threshold(channel_names=("T1", "T2")))
    case = last_cases(tmp_path / "out")["a"]
    assert case["status"] == status
    assert status == "done" or case["error"]["id"] == "MM-IO-061"


def test_no_child_process_and_no_shared_memory(five, tmp_path):
    """R7, seen by the interpreter's own audit: nothing forks, and the module of shared memory is never loaded."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import fake_run

        FORBIDDEN = ("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "subprocess.Popen")
        seen = []
        sys.addaudithook(lambda event, arguments: seen.append(event) if event in FORBIDDEN else None)
        assert fake_run.run_folder({str(five)!r}, {str(tmp_path / "out")!r}, fake_run.Threshold()) == 3
        assert not seen, seen
        assert "multiprocessing.shared_memory" not in sys.modules and "_posixshmem" not in sys.modules
        assert "torch" not in sys.modules
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_every_message_and_every_field_of_the_report_is_documented(run, five, tmp_path):
    page = (CHECKOUT / "docs" / "reference" / "report.md").read_text()
    run()
    fields = {key for record in records(tmp_path / "out") for key in record}
    fields |= set(last_cases(tmp_path / "out")["case_9"]["error"]) | {"frames"}
    fields |= set(last_cases(tmp_path / "out")["case_0"]["output"])
    missing = [name for name in sorted(fields | set(MESSAGES)) if f"`{name}`" not in page]
    assert not missing
