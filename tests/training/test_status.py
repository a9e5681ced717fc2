"""``medmamba status`` says how a training stands from its folder alone, whatever wrote it and whatever happened."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba import cli
from medmamba.training.progress import Progress, write_progress
from medmamba.training.status import fold_status, runs_in

DICE = [0.1, 0.5, 0.4]


def save(folder: Path, name: str, epoch: int, ours: dict[str, object] | None = None) -> Path:
    """A checkpoint after ``epoch`` epochs of 100 s each, of a stock trainer, or with ``ours`` of one of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "network_weights": {"w": torch.zeros(3000)},
        "optimizer_state": {"state": {}, "param_groups": []},
        "logging": {
            "ema_fg_dice": [np.float64(dice) for dice in DICE[:epoch]],
            "epoch_start_timestamps": [1000.0 * i for i in range(epoch + 1)],
            "epoch_end_timestamps": [1000.0 * i + 100 for i in range(epoch)],
        },
        "_best_ema": np.float64(max(DICE)),
        "current_epoch": epoch,
        "trainer_name": "nnUNetTrainer",
        **({} if ours is None else {"medmamba": ours}),
    }
    path = folder / f"checkpoint_{name}.pth"
    torch.save(content, path)
    return path


OURS = {
    "trainer": "nnUNetTrainerVMUNet",
    "iteration": 0,
    "schedule": {"num_epochs": 50, "num_iterations_per_epoch": 250},
}


@pytest.fixture
def run(tmp_path) -> Path:
    """Folder of a fold, not made yet."""
    return tmp_path / "Dataset901_Test" / "nnUNetTrainerX__nnUNetPlans__2d" / "fold_0"


def status(capfd, *arguments: object) -> tuple[int, str]:
    """Exit code and standard output of the command."""
    code = cli.main(["status", *map(str, arguments)])
    return code, capfd.readouterr().out


def test_a_stock_run_that_can_go_on(run, capfd):
    save(run, "latest", 2)
    save(run, "best", 2)
    (run / "debug.json").write_text(json.dumps({"num_epochs": "1000"}))
    code, out = status(capfd, run)
    assert code == 0
    assert "Dataset901_Test/nnUNetTrainerX__nnUNetPlans__2d/fold_0" in out
    assert "nnUNetTrainer: not known whether it runs" in out
    assert "2 of 1000 epochs complete" in out
    assert "best EMA pseudo Dice 0.5000, epoch 1" in out
    assert "0:01:40 per epoch, 1 d 3:43:20 of training left" in out
    assert "resumable from checkpoint_latest.pth at epoch 2" in out


def test_a_finished_run_with_its_validation(run, capfd):
    save(run, "final", 3, OURS)
    save(run, "best", 2, OURS)
    (run / "validation").mkdir()
    (run / "validation" / "summary.json").write_text(json.dumps({"foreground_mean": {"Dice": 0.875}}))
    code, out = status(capfd, run)
    assert code == 0
    assert "nnUNetTrainerVMUNet: finished" in out
    assert "final validation Dice 0.8750 (whole images)" in out
    assert "nothing is left to resume" in out
    assert "of training left" not in out


def test_progress_counts_where_it_is_newer_than_the_checkpoints(run):
    save(run, "latest", 2, OURS)
    write_progress(
        run, Progress(4, 50, 50, "training", best_dice=0.7, best_epoch=3, seconds_per_epoch=10.0, iterations=100)
    )
    found = fold_status(run)
    assert (found.epoch, found.iteration, found.epochs) == (4, 50, 50)
    assert (found.best_dice, found.best_epoch) == (0.7, 3)
    assert found.eta_s == pytest.approx((50 - 4.5) * 10)
    assert (found.state, found.is_running) == ("training", True)
    assert found.resume is not None
    assert found.resume.position == (2, 0)


def test_a_checkpoint_counts_where_it_is_newer_than_progress(run):
    save(run, "latest", 3, {**OURS, "iteration": 125})
    write_progress(run, Progress(1, 0, 50, "stopped", best_dice=0.1, best_epoch=0, seconds_per_epoch=1.0))
    found = fold_status(run)
    assert (found.epoch, found.iteration) == (3, 125)
    assert (found.best_dice, found.best_epoch) == (0.5, 1)
    assert found.seconds_per_epoch == 100
    assert found.eta_s == pytest.approx((50 - 3.5) * 100)


def test_a_run_that_was_killed_is_told_from_one_that_stopped(run, capfd):
    save(run, "latest", 2, OURS)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    write_progress(run, Progress(2, 0, 50, "training", pid=child.pid))
    assert "not running: it was killed" in status(capfd, run)[1]
    write_progress(run, Progress(2, 0, 50, "stopped"))
    assert "not running: it was asked to stop" in status(capfd, run)[1]
    write_progress(run, Progress(2, 0, 50, "training", host="elsewhere"))
    assert "only its own machine knows (process" in status(capfd, run)[1]
    write_progress(run, Progress(2, 0, 50, "training"))
    assert "nnUNetTrainerVMUNet: running (process" in status(capfd, run)[1]


def test_a_damaged_checkpoint_is_named_with_the_one_that_is_left(run, capfd):
    torn = save(run, "latest", 3)
    torn.write_bytes(torn.read_bytes()[:-500])
    save(run, "previous", 2)
    code, out = status(capfd, run)
    assert code == 3
    assert "resumable from checkpoint_previous.pth at epoch 2" in out
    assert "damaged: " in out
    assert "checkpoint_latest.pth is damaged" in out


def test_damaged_weights_are_found_by_a_thorough_look(run, capfd):
    path = save(run, "latest", 3)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(12_000)) + 5] = 1
    path.write_bytes(content)
    assert status(capfd, run)[0] == 0
    code, out = status(capfd, run, "--thorough")
    assert code == 3
    assert "checksum" in out


def test_a_run_without_a_checkpoint_cannot_be_resumed(run, capfd):
    run.mkdir(parents=True)
    code, out = status(capfd, run)
    assert code == 3
    assert "no epoch is known to be complete" in out
    assert "not resumable" in out


def test_a_run_that_has_just_begun_is_fine(run, capfd):
    run.mkdir(parents=True)
    write_progress(run, Progress(0, 3, 50, "training"))
    code, out = status(capfd, run)
    assert code == 0
    assert "0 of 50 epochs complete, and 3 iterations of the next" in out


def test_folds_of_models_are_found_from_above(run, tmp_path, capfd):
    for model in ("nnUNetTrainerX__nnUNetPlans__2d", "nnUNetTrainerY__nnUNetPlans__2d"):
        for fold in ("fold_0", "fold_all"):
            save(tmp_path / "Dataset901_Test" / model / fold, "latest", 1)
    (run.parent / "fold_notes").mkdir()
    assert runs_in(run) == [run]
    assert runs_in(run.parent) == [run, run.parent / "fold_all"]
    assert len(runs_in(run.parent.parent)) == 4
    torn = run / "checkpoint_latest.pth"
    torn.write_bytes(b"")
    code, out = status(capfd, run.parent.parent, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["is_fine"] for line in lines] == [False, True, True, True]
    assert code == 3


def test_a_run_is_known_by_its_files_too(tmp_path):
    save(tmp_path / "copied", "best", 1)
    assert runs_in(tmp_path / "copied") == [tmp_path / "copied"]


def test_json_says_everything(run, capfd):
    save(run, "latest", 2, {**OURS, "iteration": 7})
    save(run, "previous", 2).write_bytes(b"PK")
    code, out = status(capfd, run, "--json")
    found = json.loads(out)
    assert code == 3
    assert found["resume"] == {"file": "checkpoint_latest.pth", "epoch": 2, "iteration": 7}
    assert [one["file"] for one in found["damaged"]] == ["checkpoint_previous.pth"]
    assert found["bytes"] == sum(path.stat().st_size for path in run.iterdir())
    assert found["free_bytes"] > 0
    assert (found["best_ema_pseudo_dice"], found["best_epoch"], found["epochs"]) == (0.5, 1, 50)
    assert found["run"] == str(run)


def test_a_dice_that_is_no_number_is_none(run, capfd, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DICE", [float("nan"), float("nan"), 0.0])
    save(run, "latest", 2)
    assert json.loads(status(capfd, run, "--json")[1])["best_ema_pseudo_dice"] is None


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_what_is_no_run_is_wrong_usage(tmp_path, capfd, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert cli.main(["status", str(tmp_path / name)]) == 2
    assert "holds no training; give a folder fold_N" in capfd.readouterr().err


def test_nothing_of_nnunet_is_imported(run):
    save(run, "latest", 2)
    code = f"""
        import sys
        from medmamba import cli
        assert cli.main(["status", {str(run)!r}]) == 0
        names = ("nnunetv2", "matplotlib", "monai", "SimpleITK", "tensorboard")
        heavy = [name for name in names if name in sys.modules]
        assert not heavy, heavy
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
