"""The whole demo, short and long, and everything that stops it before or during the work."""

from __future__ import annotations

import io
import json
import multiprocessing.process
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from medmamba.cli import main
from medmamba.command import CommandError
from medmamba.demo.console import Console
from medmamba.demo.dataset import SHIPPED
from medmamba.demo.folder import MARKER
from medmamba.demo.run import EXPECTED_DICE, run_demo
from medmamba.demo.settings import Settings

SHORT = Settings(iterations=2)


def quiet() -> Console:
    return Console(io.StringIO(), io.StringIO())


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_importing_the_command_imports_nothing_heavy():
    heavy = "torch numpy scipy matplotlib SimpleITK nnunetv2 monai medmamba_kernels"
    code = f"import sys, medmamba.demo.commands; print(sorted(set('{heavy}'.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("iterations", "epochs", "total"), [(1, 1, 1), (7, 7, 7), (400, 20, 400), (401, 20, 420)])
def test_all_epochs_are_equally_long_and_no_iteration_is_lost(iterations, epochs, total):
    settings = Settings(iterations=iterations)
    assert (settings.num_epochs, settings.total_iterations) == (epochs, total)
    assert settings.request().schedule.warmup_epochs < epochs


WRONG = {
    "unknown network": ({"settings": Settings(network="vmnet")}, "no network 'vmnet'; known: .*vmunet"),
    "unknown variant": ({"settings": Settings(variant="tiny")}, "no variant 'tiny'; known: .*small"),
    "unknown optimizer": ({"settings": Settings(optimizer="Adam")}, "no optimizer 'Adam'; known: SGD, AdamW"),
    "no such data": ({"data": Path("nowhere")}, "no folder .*nowhere; expected nnU-Net raw layout"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(tmp_path, arguments, message):
    out = tmp_path / "out"
    with pytest.raises(CommandError, match=message) as caught:
        run_demo(out, console=quiet(), **arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_data_that_do_not_fit_leave_an_earlier_run_as_it_was(tmp_path, make_dataset):
    out = tmp_path / "out"
    out.mkdir()
    (out / MARKER).write_text(json.dumps({"paths": ["report.json"]}))
    (out / "report.json").write_text("of the run before")
    data = make_dataset(num_cases=2)
    with pytest.raises(CommandError, match="needs at least 3"):
        run_demo(out, data, console=quiet())
    assert (out / "report.json").read_text() == "of the run before"


@pytest.mark.parametrize("inside", [".", "data"], ids=["the same folder", "a folder in it"])
def test_the_output_folder_may_not_hold_the_data(tmp_path, make_dataset, inside):
    data = make_dataset()
    out = data if inside == "." else data.parent
    before = files(tmp_path)
    with pytest.raises(CommandError, match="lies inside --out"):
        run_demo(out, data, console=quiet())
    assert files(tmp_path) == before


BAD_COMMAND_LINES = {
    "missing data": (["--data", "nowhere"], "medmamba demo: no folder"),
    "unknown network": (["--network", "vmnet"], "medmamba demo: no network 'vmnet'; known"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_COMMAND_LINES.values(), ids=BAD_COMMAND_LINES)
def test_the_command_answers_wrong_input_with_one_line_on_stderr(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--iterations", "0"], ["--iterations", "many"], ["--seed", "-1"]], ids=str)
def test_numbers_out_of_range_are_wrong_usage(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.fixture
def no_children(monkeypatch):
    """Let any attempt to start a child process fail."""

    def refuse(process):
        raise AssertionError(f"a child process was started: {process}")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


@pytest.mark.slow
def test_own_data_run_to_the_end_in_one_folder_and_one_process(tmp_path, make_dataset, monkeypatch, no_children):
    for name in [name for name in os.environ if name.startswith("nnUNet")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("nnUNet_raw", "/not/to/be/used")
    data = make_dataset("my blobs", num_cases=4, num_channels=2, spacing_mm=(2.0, 1.0, 1.0), ending=".mha")
    source = files(tmp_path)
    out, console = tmp_path / "out", quiet()

    result = run_demo(out, data, SHORT, console)

    assert {name: value for name, value in os.environ.items() if name.startswith("nnUNet")} == {
        "nnUNet_raw": "/not/to/be/used"
    }
    assert {path for path in files(tmp_path) if not path.startswith("out/")} == source
    report = json.loads(result.report.read_text())
    assert report["dataset"] == "Dataset999_my_blobs"
    assert report["trained_on"] == ["case_0", "case_1"]
    assert set(report["scores"]["cases"]) == {"case_2", "case_3"}
    assert report["settings"]["iterations"] == 2
    assert {path.name for path in (out / "predictions").glob("*.mha")} == {"case_2.mha", "case_3.mha"}
    with Image.open(result.picture) as image:
        assert min(image.size) > 300
    said = console.output.getvalue()
    assert "2/2" in said
    assert f"mean Dice {result.scores.mean.dice:.3f}" in said
    assert str(out) in said.splitlines()[-1]
    # nnU-Net's own words are in the log and nowhere else.
    assert "Training done." in (out / "log.txt").read_text()
    assert "Training done." not in said

    (out / "mine.txt").write_text("foreign")
    (out / "predictions" / "old.mha").write_text("of the run before")
    again = run_demo(out, data, SHORT, quiet())
    assert (out / "mine.txt").read_text() == "foreign"
    assert not (out / "predictions" / "old.mha").exists()
    assert again.scores == result.scores, "the same seed on the same machine gives the same result"


@pytest.mark.slow
def test_the_trained_folder_predicts_with_nnunet_and_none_of_our_trainers(tmp_path, make_dataset, monkeypatch):
    data = make_dataset()
    out = tmp_path / "out"
    run_demo(out, data, SHORT, quiet())
    (model,) = (out / "nnUNet_results" / data.name).iterdir()
    code = (
        "import sys, torch\n"
        "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor\n"
        "predictor = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False)\n"
        "predictor.initialize_from_trained_model_folder(sys.argv[1], ('all',))\n"
        "predictor.predict_from_files_sequential([[sys.argv[2]]], [sys.argv[3]])\n"
        "assert 'medmamba.nnunet.trainers' not in sys.modules\n"
    )
    image = out / "nnUNet_raw" / data.name / "imagesTs" / "case_3_0000.nii.gz"
    command = [sys.executable, "-c", code, str(model), str(image), str(tmp_path / "case_3")]
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "nnUNet_def_n_proc": str(os.cpu_count())}
    )
    assert (tmp_path / "case_3.nii.gz").read_bytes() == (out / "predictions" / "case_3.nii.gz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (KeyboardInterrupt(), 130, "training was interrupted after 1 of 3 steps; the same command starts again"),
        (MemoryError("no room"), 1, r"training failed \(MemoryError: no room\); details are in .*log\.txt"),
    ],
    ids=["interrupted", "out of memory"],
)
def test_a_run_that_stops_says_why_and_the_next_one_starts_afresh(tmp_path, make_dataset, error, exit_code, message):
    class Stopping(Console):
        def progress(self, label, total):
            progress = super().progress(label, total)
            step = progress.step

            def stop_in_second_step(note=""):
                if progress.done == 1:
                    raise error
                step(note)

            progress.step = stop_in_second_step
            return progress

    data, out = make_dataset(), tmp_path / "out"
    with pytest.raises(CommandError, match=message) as caught:
        run_demo(out, data, Settings(iterations=3), Stopping(io.StringIO(), io.StringIO()))
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)
    assert not (out / "report.json").exists()
    assert run_demo(out, data, Settings(iterations=1), quiet()).report.is_file()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_a_line_and_an_exit_code(tmp_path, make_dataset, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    monkeypatch.setattr(nnUNetTrainer, "train_step", lambda self, batch: {"loss": float("nan")})
    with pytest.raises(CommandError, match="training loss is nan at epoch 0, iteration 0") as caught:
        run_demo(tmp_path / "out", make_dataset(), SHORT, quiet())
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
def test_the_shipped_demo_reaches_its_dice_with_no_variable_set(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
    command = [sys.executable, "-m", "medmamba.cli", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "medmamba-demo"
    report = json.loads((out / "report.json").read_text())
    assert report["scores"]["mean"]["dice"] >= EXPECTED_DICE
    assert f"mean Dice {report['scores']['mean']['dice']:.3f}" in done.stdout
    with Image.open(out / "demo.png") as image:
        assert min(image.size) > 500
    assert (out / "nnUNet_raw" / SHIPPED.name / "LICENSE").is_file()
    assert list(tmp_path.iterdir()) == [out]
