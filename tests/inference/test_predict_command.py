"""``medmamba predict -m`` and ``medmamba report`` as their users meet them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image as Picture

from medmamba.cli import main
from medmamba.inference.model import export_model
from medmamba.inference.reading import read_image
from medmamba.inference.writing import verify_segmentation
from medmamba.mixers import ScanCore

FAST = ["--step", "1", "--disable_tta", "--device", "cpu"]


@pytest.fixture
def predict(package, capsys):
    """Runs the command with the package; returns exit code, stdout and stderr."""

    def run(inputs: Path, output: Path, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["predict", "-m", str(package), "-i", str(inputs), "-o", str(output), *FAST, *more])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def cases_of(report: Path) -> dict[str, dict]:
    records = [json.loads(line) for line in report.read_text().splitlines()]
    return {record["case"]: record for record in records if record["record"] == "case"}


def test_five_files_with_one_junk_give_four_segmentations_four_pictures_and_exit_code_3(predict, five, tmp_path):
    out = tmp_path / "out"
    code, said, complaints = predict(five, out)
    assert code == 3
    assert "4 done, 1 refused" in said
    assert complaints == ""
    names = [f"case_{k}" for k in range(4)]
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"{name}.nii.gz" for name in names]
    assert sorted(path.name for path in (out / "preview").iterdir()) == [f"{name}.png" for name in names]
    for name, case in cases_of(out / "report.jsonl").items():
        if name in names:
            image = read_image(five / f"{name}.nii.gz")
            assert verify_segmentation(out / f"{name}.nii.gz", case["output"]["sha256"], image) is None
            assert Picture.open(out / "preview" / f"{name}.png").size[0] > 300


def test_a_second_run_keeps_what_verifies_unless_asked_otherwise_or_with_other_settings(predict, five, tmp_path):
    out = tmp_path / "out"
    predict(five, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    code, said, _ = predict(five, out)
    assert code == 3
    assert "4 verified outputs kept" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for more in (["--restart"], ["--fold", "1"], ["--prefer", "qform"]):
        assert "kept" not in predict(five, out, *more)[1].splitlines()[-1]
        assert all(path.stat().st_mtime_ns > before[path] for path in before)
        before = {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], (0.5, True, False)),
        (["--preset", "balanced"], (0.5, False, True)),
        (["--preset", "fast"], (0.75, False, True)),
        (["--preset", "fast", "--step", "1"], (1.0, False, True)),
        (["--disable_tta", "--max-ram", "100"], (0.5, False, False)),
    ],
)
def test_a_preset_decides_what_no_option_does(package, write_image, tmp_path, options, settings):
    image = write_image(tmp_path / "a.nii.gz", values=np.arange(512, dtype=np.int16).reshape(8, 8, 8), at=np.eye(4))
    words = ["predict", "-m", str(package), "-i", str(image), "-o", str(tmp_path / "b.nii.gz"), "--no-preview"]
    assert main([*words, *options]) == 0
    found = cases_of(tmp_path / "b.report.jsonl")["a"]["settings"]
    assert (found["step"], found["mirrors"], found["skips_air"]) == settings


def test_air_is_masked_only_where_asked_and_the_report_says_so(make_trained, write_image, tmp_path, monkeypatch):
    """An image with zeros in a quarter, which nnU-Net's crop cannot remove, on a network with scans."""
    model = export_model(make_trained(tmp_path / "trained", "vmunet").folder, tmp_path / "model").path
    values = np.random.default_rng(0).integers(500, 1000, (14, 14, 8)).astype(np.int16)
    values[:10, :10] = 0
    image = write_image(tmp_path / "a.nii.gz", values=values, at=np.eye(4))
    scan, masks = ScanCore.forward, []

    def forward(self, u, grid, *, mask=None):
        masks.append(mask)
        return scan(self, u, grid, mask=mask)

    monkeypatch.setattr(ScanCore, "forward", forward)
    settings = []
    for options in ([], ["--mask-air"]):
        out = tmp_path / f"b{len(settings)}.nii.gz"
        words = ["predict", "-m", str(model), "-i", str(image), "-o", str(out), "--no-preview", "--no-mirroring"]
        assert main([*words, *options]) == 0
        settings.append(cases_of(tmp_path / f"b{len(settings)}.report.jsonl")["a"]["settings"])
        kept = [mask.float().mean() for mask in masks if mask is not None]
        assert bool(kept) == bool(options)
    assert 0 < np.mean(kept) < 1
    assert settings[1] == {**settings[0], "masks_air": True}
    assert "masks_air" not in settings[0]


def test_too_little_memory_fails_the_case_with_the_number_that_is_needed(predict, write_image, tmp_path):
    write_image(tmp_path / "in" / "a.nii.gz")
    assert predict(tmp_path / "in", tmp_path / "out", "--max-ram", "0.01")[0] == 4
    error = cases_of(tmp_path / "out" / "report.jsonl")["a"]["error"]
    assert error["id"] == "MM-RN-001"
    assert "GB are needed" in error["cause"]


def test_one_image_goes_into_one_file_with_report_and_picture_beside_it(predict, write_image, tmp_path):
    image = write_image(tmp_path / "in" / "scan.nii.gz")
    assert predict(image, tmp_path / "out" / "seg.nii")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "seg.nii",
        "seg.preview.png",
        "seg.report.jsonl",
    ]


def test_the_format_follows_the_image_or_the_option(predict, write_image, tmp_path):
    image = read_image(write_image(tmp_path / "scan.nii.gz"))
    (tmp_path / "in").mkdir()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image.values), str(tmp_path / "in" / "scan.mha"))
    assert predict(tmp_path / "in", tmp_path / "out", "--no-preview")[0] == 0
    assert (tmp_path / "out" / "scan.mha").is_file()
    assert not (tmp_path / "out" / "preview").exists()
    assert predict(tmp_path / "in", tmp_path / "out", "--no-preview", "--format", ".nii.gz")[0] == 0
    assert (tmp_path / "out" / "scan.nii.gz").is_file()


@pytest.mark.parametrize("value", [0, -1024])
def test_an_image_of_one_value_gets_an_empty_segmentation_that_the_report_flags(predict, write_image, tmp_path, value):
    write_image(tmp_path / "in" / "flat.nii.gz", values=np.full((9, 10, 11), value, np.int16))
    assert predict(tmp_path / "in", tmp_path / "out")[0] == 0
    case = cases_of(tmp_path / "out" / "report.jsonl")["flat"]
    assert case["facts"] == {"no_content": True}
    assert "MM-IO-088" in {note["id"] for note in case["notes"]}
    assert case["empty_labels"] == ["Anterior", "Posterior"]
    assert not np.asarray(nibabel.load(tmp_path / "out" / "flat.nii.gz").dataobj).any()


@pytest.mark.parametrize(("count", "status", "identifier"), [(1, "done", "MM-IO-087"), (900, "refused", "MM-IO-050")])
def test_voxels_that_are_not_numbers_follow_the_rule(predict, write_image, tmp_path, count, status, identifier):
    values = np.random.default_rng(0).normal(0, 50, (10, 10, 10)).astype(np.float32)
    values.ravel()[:count] = np.nan
    write_image(tmp_path / "in" / "a.nii.gz", values=values)
    predict(tmp_path / "in", tmp_path / "out")
    case = cases_of(tmp_path / "out" / "report.jsonl")["a"]
    assert case["status"] == status
    found = {note["id"] for note in case["notes"]} if status == "done" else {case["error"]["id"]}
    assert identifier in found


def test_a_case_that_is_unlike_the_training_images_is_predicted_with_a_note(predict, write_image, tmp_path):
    write_image(tmp_path / "in" / "coarse.nii.gz", at=np.diag([5.0, 5.0, 5.0, 1.0]))
    write_image(tmp_path / "in" / "usual.nii.gz", at=np.diag([1.0, 1.0, 1.0, 1.0]))
    assert predict(tmp_path / "in", tmp_path / "out")[0] == 0
    cases = cases_of(tmp_path / "out" / "report.jsonl")
    notes = {name: {note["id"] for note in case["notes"]} for name, case in cases.items()}
    assert "MM-CK-001" in notes["coarse"]
    assert "MM-CK-001" not in notes["usual"]


def test_one_of_several_volumes_is_taken_when_asked(predict, write_image, tmp_path):
    values = np.random.default_rng(0).integers(0, 100, (9, 10, 11, 2)).astype(np.int16)
    write_image(tmp_path / "in" / "a.nii.gz", values=values)
    assert predict(tmp_path / "in", tmp_path / "out")[0] == 4
    assert predict(tmp_path / "in", tmp_path / "out", "--volume", "1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "nowhere"], "MM-MD-001"),
        (["--fold", "7"], "MM-MD-018"),
        (["--device", "toaster"], "say --device cpu"),
        (["-i", "nowhere"], "does not exist"),
        (["--num-parts", "2", "--part-id", "2"], "parts count from 0 to 1"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(package, five, tmp_path, capsys, arguments, message):
    given = ["-m", str(package), "-i", str(five), "-o", str(tmp_path / "out"), *FAST, *arguments]
    assert main(["predict", *given]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_trained_folder_is_no_package_and_the_text_says_what_makes_one(trained, five, tmp_path, capsys):
    assert main(["predict", "-m", str(trained.folder), "-i", str(five), "-o", str(tmp_path / "out")]) == 2
    assert "medmamba export" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["0", "1.5", "-0.5"])
def test_a_step_that_leaves_gaps_is_refused(package, five, tmp_path, capsys, step):
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "-m", str(package), "-i", str(five), "-o", str(tmp_path), f"--step={step}"])
    assert "above 0 and at most 1" in capsys.readouterr().err


def test_help_tells_of_both_ways(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--model MODEL" in said
    assert "medmamba run nnUNetv2_predict -h" in said


def test_parts_of_a_run_are_merged_and_a_missing_one_is_named(predict, five, tmp_path, capsys):
    out = tmp_path / "out"
    first = predict(five, out, "--num-parts", "2", "--part-id", "0")[0]
    assert main(["report", str(out)]) == 75
    assert "part 1 of 2 has no report" in capsys.readouterr().out
    second = predict(five, out, "-num_parts", "2", "-part_id", "1")[0]
    assert {first, second} == {0, 3}
    assert main(["report", str(out), "-o", str(tmp_path / "all.jsonl")]) == 3
    said = capsys.readouterr().out
    assert "4 done, 1 refused, 0 failed" in said
    assert "case_9: refused while reading, MM-IO-008" in said
    assert set(cases_of(tmp_path / "all.jsonl")) == {"case_0", "case_1", "case_2", "case_3", "case_9"}
    assert main(["report", str(tmp_path / "all.jsonl")]) == 3


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no report.jsonl" in capsys.readouterr().err
    (tmp_path / "report.jsonl").write_text("hello\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "is no medmamba prediction report" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.0, 4.0])
def test_sigterm_at_any_time_ends_with_75_and_the_same_command_completes(package, write_image, tmp_path, wait_s):
    for k in range(3):
        values = np.random.default_rng(k).integers(0, 100, (24, 24, 24)).astype(np.int16)
        write_image(tmp_path / "in" / f"case_{k}.nii.gz", at=np.eye(4), values=values)
    program = "import sys; from medmamba.cli import main; print('up', flush=True); sys.exit(main())"
    words = ["predict", "-m", str(package), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    time.sleep(0.5 + wait_s)  # the command notes signals from its first line on
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    for path in (tmp_path / "out").glob("*.nii.gz"):
        assert verify_segmentation(path) is None
    assert main([*words[:-2], *FAST]) == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3


@pytest.mark.slow
def test_a_real_prediction_starts_no_process_and_opens_no_shared_memory(package, five, tmp_path):
    code = f"""
        import sys

        from medmamba.cli import main

        FORBIDDEN = ("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "subprocess.Popen")
        LOOK_UPS = (["/sbin/ldconfig", "-p"], ["/bin/sh", "-c", "hostname"])  # of libraries, while they are imported
        seen = []

        def listen(event, arguments):
            is_look_up = event == "subprocess.Popen" and arguments[1] in LOOK_UPS
            shares = event == "open" and str(arguments[0]).startswith("/dev/shm")
            if shares or (event in FORBIDDEN and not is_look_up):
                seen.append((event, str(arguments)[:200]))

        sys.addaudithook(listen)
        code = main(["predict", "-m", {str(package)!r}, "-i", {str(five)!r}, "-o", {str(tmp_path / "out")!r}, *{FAST}])
        assert not seen, seen
        sys.exit(code)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 3, result.stderr
