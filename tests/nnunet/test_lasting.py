"""A training that is ended anywhere and started again is the training that was never ended."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from medmamba.command import CommandError
from medmamba.nnunet.resume import ResumeError, remove_leftovers
from medmamba.training.checkpoints import BEST, FINAL, LATEST, PREVIOUS, candidates
from medmamba.training.progress import Progress, write_progress
from medmamba.weights import read_training

EPOCHS, ITERATIONS, VALIDATIONS = 4, 3, 2
CLOCK = ("epoch_start_timestamps", "epoch_end_timestamps")


@pytest.fixture
def plans(tiny_plans):
    tiny_plans["medmamba"]["schedule"] = {
        "num_epochs": EPOCHS,
        "num_iterations_per_epoch": ITERATIONS,
        "num_val_iterations_per_epoch": VALIDATIONS,
        "optimizer": "AdamW",
        "warmup_epochs": 1,
    }
    return tiny_plans


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    monkeypatch.setenv("MEDMAMBA_SEED", "5")
    monkeypatch.setenv("MEDMAMBA_REHEARSAL", "0")
    monkeypatch.delenv("MEDMAMBA_RESTART", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png", lambda *_: None)


@pytest.fixture
def train(make_trainer, plans):
    """Starts a training as the console command does; ``asked`` after that many training and validation steps."""

    def start(*, asked: int | None = None, number=signal.SIGTERM, changes=None, told=False):
        trainer = make_trainer("nnUNetTrainerVMUNet", changes or plans)
        trainer._is_told_to_continue = told
        count = 0

        def counted(step):
            def stepping(batch):
                nonlocal count
                if count == asked:
                    os.kill(os.getpid(), number)
                count += 1
                return step(batch)

            return stepping

        trainer.train_step, trainer.validation_step = counted(trainer.train_step), counted(trainer.validation_step)
        if asked is None:
            trainer.run_training()
        else:
            with pytest.raises(SystemExit) as ended:
                trainer.run_training()
            assert ended.value.code == 75
        return trainer

    return start


def result(folder: Path) -> dict:
    return read_training(folder / FINAL)


def same(one, other) -> bool:
    """Bit by bit, but for the clock."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        keys = one.keys() - set(CLOCK)
        return keys == other.keys() - set(CLOCK) and all(same(one[key], other[key]) for key in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


@pytest.fixture(scope="module")
def place_of_whole(tmp_path_factory) -> Path:
    """Where the tests of this file find the training that nobody ended, once one of them has trained it."""
    return tmp_path_factory.mktemp("lasting") / "whole"


@pytest.fixture
def whole(train, place_of_whole) -> Path:
    """Folder of the training that nobody ended; do not write to it."""
    if not place_of_whole.exists():
        trainer = train()
        shutil.copytree(trainer.folder, place_of_whole)
        shutil.rmtree(trainer.folder)
        trainer.folder.mkdir()
    return place_of_whole


STEPS_PER_EPOCH = ITERATIONS + VALIDATIONS
MIDDLE = 2 * STEPS_PER_EPOCH + 2
#: Before anything is done; within an epoch; with all training of it done; in its validation; between two; at the end.
PLACES = [0, 1, ITERATIONS, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, MIDDLE, EPOCHS * STEPS_PER_EPOCH - 1]
OFTEN = [0, MIDDLE, STEPS_PER_EPOCH - 1]


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        *(pytest.param(place, signal.SIGTERM, marks=() if place in OFTEN else pytest.mark.nightly) for place in PLACES),
        (ITERATIONS, signal.SIGUSR1),
        (1, signal.SIGINT),
    ],
)
def test_a_training_that_was_asked_to_stop_goes_on_to_the_same_bits(train, whole, asked, number):
    train(asked=asked, number=number)
    trainer = train()
    assert same(result(trainer.folder), result(whole))
    assert same(read_training(trainer.folder / BEST), read_training(whole / BEST))


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.nightly), "3"])
def test_batches_do_not_depend_on_the_processes_that_make_them(train, whole, monkeypatch, workers):
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    train(asked=MIDDLE)
    assert same(result(train().folder), result(whole))


def test_a_rehearsal_leaves_no_trace(train, whole, monkeypatch, capsys):
    monkeypatch.setenv("MEDMAMBA_REHEARSAL", "1")
    trainer = train()
    printed = capsys.readouterr().out
    assert "an iteration takes" in printed
    assert "checkpoint, training, validation, export and evaluation work" in printed
    assert same(result(trainer.folder), result(whole))
    assert not list(trainer.folder.glob("*rehearsal*"))


def test_two_trainings_without_a_seed_differ(train, monkeypatch):
    monkeypatch.delenv("MEDMAMBA_SEED")
    folder = train().folder
    first = result(folder)["network_weights"]
    shutil.rmtree(folder)
    folder.mkdir()
    assert not same(result(train().folder)["network_weights"], first)


def test_checkpoints_come_by_the_clock_too_and_the_one_before_stays(train, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMAMBA_SAVE_MINUTES", "0")
    trainer = train(asked=MIDDLE)
    there = {one.path.name: one.position for one in candidates(trainer.folder)}
    assert there[LATEST] == (2, 3)
    assert there[PREVIOUS] == (2, 2)


@pytest.mark.parametrize(
    "damage", ["flipped", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("cut", "empty"))]
)
def test_a_damaged_checkpoint_is_kept_and_the_one_before_is_taken(train, whole, monkeypatch, capsys, damage):
    monkeypatch.setenv("MEDMAMBA_SAVE_MINUTES", "0")
    path = train(asked=MIDDLE).folder / LATEST
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    path.write_bytes({"cut": good[:middle], "flipped": flipped, "empty": b""}[damage])
    bad = path.read_bytes()
    trainer = train()
    printed = capsys.readouterr().out
    assert "WARNING" in printed
    assert f"Continuing from {PREVIOUS}: epoch 2, iteration 2" in printed
    assert (trainer.folder / f"{LATEST}.damaged").read_bytes() == bad
    assert same(result(trainer.folder), result(whole))


def test_without_a_checkpoint_that_can_be_read_nothing_begins_in_silence(train):
    folder = train(asked=MIDDLE).folder
    for one in candidates(folder):
        one.path.write_bytes(b"torn")
    with pytest.raises(ResumeError, match=r"no checkpoint in .* can be read; they are kept as \*\.damaged"):
        train()
    assert len(list(folder.glob("*.damaged"))) == 2
    assert (train().folder / FINAL).is_file()


def test_the_best_is_taken_where_it_got_furthest(train, whole, capsys):
    folder = train(asked=2 * STEPS_PER_EPOCH + 1).folder
    (folder / LATEST).unlink()
    there = candidates(folder)
    trainer = train()
    assert f"Continuing from {BEST}: epoch {there[0].epoch}" in capsys.readouterr().out
    assert same(result(trainer.folder), result(whole))


def test_a_better_best_is_not_overwritten(train):
    folder = train(asked=MIDDLE).folder
    better = torch.load(folder / BEST, weights_only=True)
    better |= {"_best_ema": 0.99, "current_epoch": 0}
    torch.save(better, folder / BEST)
    before = (folder / BEST).read_bytes()
    trainer = train()
    assert (folder / BEST).read_bytes() == before
    assert result(trainer.folder)["_best_ema"] == 0.99


def test_a_finished_training_is_not_trained_again(train, capsys):
    folder = train().folder
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    trainer = train()
    assert f"All {EPOCHS} epochs are done" in capsys.readouterr().out
    assert trainer.dataloader_train is None
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before
    assert set(before) == {BEST, FINAL}


def test_other_plans_are_refused_and_continued_when_told(train, plans, capsys):
    train(asked=MIDDLE)
    other = deepcopy(plans)
    other["configurations"]["3d_fullres"]["batch_size"] = 1
    other["medmamba"]["schedule"]["initial_lr"] = 0.01
    with pytest.raises(ResumeError, match=r"batch_size 2 -> 1.*add --c.*--restart") as refused:
        train(changes=other)
    assert "initial_lr 0.001 -> 0.01" in str(refused.value)
    train(changes=other, told=True, asked=0)
    assert "WARNING: --c continues a training that was begun otherwise" in capsys.readouterr().out
    trainer = train(changes=other)  # told once is enough
    assert (trainer.folder / FINAL).is_file()


def test_beginning_anew_is_a_choice_and_keeps_what_was_there(train, whole, monkeypatch):
    folder = train(asked=MIDDLE).folder
    before = (folder / LATEST).read_bytes()
    monkeypatch.setenv("MEDMAMBA_RESTART", "1")
    trainer = train()
    (aside,) = folder.glob("replaced_*")
    assert (aside / LATEST).read_bytes() == before
    assert same(result(trainer.folder), result(whole))


def test_a_job_that_was_requeued_continues_whatever_it_was_begun_with(train, monkeypatch, capsys):
    monkeypatch.setenv("MEDMAMBA_RESTART", "1")
    train(asked=MIDDLE)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    trainer = train()
    assert f"Continuing from {LATEST}: epoch 2, iteration 3" in capsys.readouterr().out
    assert not list(trainer.folder.glob("replaced_*"))


def test_continuing_takes_the_furthest_and_not_the_name_that_nnunet_likes_best(train, make_trainer, plans):
    folder = train(asked=MIDDLE).folder
    shutil.copy(folder / LATEST, folder / PREVIOUS)
    (folder / LATEST).write_bytes(b"torn")
    trainer = make_trainer("nnUNetTrainerVMUNet", plans)
    trainer._is_told_to_continue = True
    trainer.load_checkpoint(str(folder / LATEST))
    assert (trainer.current_epoch, trainer.iteration) == (2, 3)


def test_stock_nnunet_continues_from_our_checkpoints(train, make_trainer, plans):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    path = train(asked=MIDDLE).folder / LATEST
    trainer = make_trainer("nnUNetTrainerVMUNet", plans)
    trainer.initialize()
    nnUNetTrainer.load_checkpoint(trainer, str(path))
    assert trainer.current_epoch == 2
    assert {len(values) for values in trainer.logger.get_checkpoint().values()} == {2}


def test_a_disk_that_takes_no_more_stops_with_words_and_leaves_what_is_there(train, monkeypatch, capsys):
    real, count = torch.save, 0

    def full(content, path):
        nonlocal count
        count += 1
        if count > 3:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        real(content, path)

    monkeypatch.setenv("MEDMAMBA_SAVE_MINUTES", "0")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as ended:
        train()
    assert ended.value.code == 75
    printed = capsys.readouterr().out
    assert f"{LATEST} cannot be written" in printed
    assert "Make room" in printed
    monkeypatch.setattr(torch, "save", real)
    assert (train().folder / FINAL).is_file()


def test_what_killed_processes_left_is_removed_unless_one_still_trains(train, tmp_path):
    folder = train(asked=MIDDLE).folder
    left = folder / f".{LATEST}.abc.tmp"
    left.write_bytes(b"half")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        time.sleep(0.1)
        write_progress(folder, Progress(epoch=2, iteration=0, epochs=EPOCHS, state="training", pid=other.pid))
        remove_leftovers(folder)
        assert left.exists()
    finally:
        other.kill()
        other.wait()
    train()
    assert not left.exists()


def test_a_note_that_cannot_be_written_stops_with_words_too(train, monkeypatch, capsys):
    def full(folder, progress):
        raise OSError(errno.ENOSPC, "No space left on device")  # as of a file that is open: without its name

    with monkeypatch.context() as patch:
        patch.setattr("medmamba.nnunet.watch.write_progress", full)
        with pytest.raises(SystemExit) as ended:
            train()
    assert ended.value.code == 75
    assert "cannot be written (No space left on device)" in capsys.readouterr().out
    assert (train().folder / FINAL).is_file()


@pytest.mark.parametrize(("variable", "value"), [("MEDMAMBA_SEED", "-1"), ("MEDMAMBA_SAVE_MINUTES", "often")])
def test_a_bad_variable_is_refused(make_trainer, plans, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(CommandError, match=f"{variable}='{value}'"):
        make_trainer("nnUNetTrainerVMUNet", plans)
