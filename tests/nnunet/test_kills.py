"""Stock ``nnUNetv2_train`` with our trainer, killed at any moment, ends where it would have ended."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medmamba.training.checkpoints import BEST, FINAL, LATEST, candidate, candidates
from medmamba.weights import read_training

LIVES = Path(__file__).with_name("lives.py")
#: Number of kills -> epochs of the training: enough that no machine is through with it before the last kill.
EPOCHS = {8: 12, 30: 40}
SCHEDULE = {
    "num_epochs": 40,
    "num_iterations_per_epoch": 4,
    "num_val_iterations_per_epoch": 1,
    "optimizer": "AdamW",
    "save_every": 2,
}


class Lives:
    """Starts lives of one training, one after the other."""

    def __init__(self, folder, plans_name: str) -> None:
        self._log = folder.root / f"lives{len(list(folder.root.glob('lives*')))}.log"
        self._log.touch()
        arguments = ["901", "3d_fullres", "0", "-p", plans_name, "-device", "cpu"]
        command = [sys.executable, str(LIVES), str(self._log), *arguments]
        self._server = subprocess.Popen(
            [*command, "-tr", "nnUNetTrainerVMUNet"],
            env={**os.environ, **folder.variables(), "OMP_NUM_THREADS": "1", "MEDMAMBA_SEED": "5"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder.root,
        )
        self.fold = (
            folder.results / "Dataset901_Isotropic" / f"nnUNetTrainerVMUNet__{plans_name}__3d_fullres" / "fold_0"
        )

    def start(self, **variables: str) -> int:
        """Number of the process of a new life."""
        variables = {"MEDMAMBA_REHEARSAL": "0", "MEDMAMBA_SAVE_MINUTES": "0", **variables}
        self._server.stdin.write(json.dumps(variables) + "\n")
        self._server.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Exit code of the life, negative for a signal."""
        return int(self._line())

    def log(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(60)

    def _line(self) -> str:
        line = self._server.stdout.readline()
        assert line, self.log()[-4000:]
        return line


@pytest.fixture(scope="module")
def start_lives(folder, raw_cases, plans_to_train):
    """Lives of a training of its own, by the name of its plans."""
    plans = plans_to_train(SCHEDULE, "nnUNetAskedPlans", "nnUNetFullPlans")
    for kills, epochs in EPOCHS.items():
        names = (f"nnUNetWhole{kills}Plans", f"nnUNetKilled{kills}Plans")
        plans += plans_to_train({**SCHEDULE, "num_epochs": epochs}, *names)
    folder.add_dataset(raw_cases, plans)
    started = []

    def start(name: str) -> Lives:
        started.append(Lives(folder, name))
        return started[-1]

    yield start
    for lives in started:
        lives.close()


def whole_training(start_lives, kills: int) -> dict:
    """Final checkpoint of the training that nobody ended."""
    lives = start_lives(f"nnUNetWhole{kills}Plans")
    lives.start(MEDMAMBA_SAVE_MINUTES="15")
    assert lives.end() == 0, lives.log()[-4000:]
    before = (lives.fold / FINAL).read_bytes()
    (lives.fold / "validation" / "summary.json").unlink()
    lives.start()  # validates again, and does not train
    assert lives.end() == 0, lives.log()[-4000:]
    assert f"All {EPOCHS[kills]} epochs are done" in lives.log()
    assert (lives.fold / FINAL).read_bytes() == before
    assert (lives.fold / "validation" / "summary.json").is_file()
    return read_training(lives.fold / FINAL)


def same_weights(one: dict, other: dict) -> bool:
    weights = one["network_weights"]
    return all(torch.equal(value, other["network_weights"][name]) for name, value in weights.items())


def furthest(fold: Path) -> tuple[int, int]:
    """Epoch and iteration to go on with."""
    return max((one.position for one in candidates(fold)), default=(0, 0))


def halves(fold: Path) -> set[Path]:
    """Checkpoints that are being written, or were when their process was killed."""
    return set(fold.glob(".checkpoint_*.tmp"))


def best_of(fold: Path) -> float | None:
    """Of a file that has to be whole whenever it is there."""
    if not (fold / BEST).exists():
        return None
    assert candidate(fold / BEST, thorough=True).problem is None
    return read_training(fold / BEST)["_best_ema"]


@pytest.mark.parametrize(
    "kills", [pytest.param(8, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.nightly)]
)
def test_kills_at_random_moments_lose_nothing(start_lives, kills):
    whole = whole_training(start_lives, kills)
    lives, draw = start_lives(f"nnUNetKilled{kills}Plans"), random.Random(kills)
    position, best, within_a_save = (0, 0), None, 0
    for number in range(kills):
        before = halves(lives.fold)
        assert len(before) <= 2, "what killed lives leave must not pile up"
        pid = lives.start()
        _wait_until(lambda: (lives.fold / "tensorboard").is_dir())
        time.sleep(draw.uniform(0, 1.5))
        if number % 3 == 0:  # inside a save
            _wait_until(lambda before=before: halves(lives.fold) - before)
        os.kill(pid, signal.SIGKILL)
        code = lives.end()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        within_a_save += bool(halves(lives.fold) - before)
        assert all(one.problem is None for one in candidates(lives.fold, thorough=True))
        reached = furthest(lives.fold)
        assert reached >= position
        now = best_of(lives.fold)
        assert best is None or now >= best
        position, best = reached, now
    assert number == kills - 1, "the training was over before it was killed often enough"
    assert within_a_save > 0
    lives.start(MEDMAMBA_SAVE_MINUTES="15")
    assert lives.end() == 0, lives.log()[-4000:]
    final = read_training(lives.fold / FINAL)
    assert final["current_epoch"] == EPOCHS[kills]
    assert same_weights(final, whole)
    assert final["_best_ema"] == whole["_best_ema"]
    assert final["logging"]["train_losses"] == whole["logging"]["train_losses"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_life_that_is_asked_to_stop_says_75_and_the_same_command_goes_on(start_lives, number):
    lives = start_lives("nnUNetAskedPlans")
    before = furthest(lives.fold)
    pid = lives.start(MEDMAMBA_SAVE_MINUTES="15")
    _wait_until(lambda: furthest(lives.fold) > before)
    os.kill(pid, number)
    assert lives.end() == 75, lives.log()[-4000:]
    reached = candidates(lives.fold)[0]
    assert reached.path.name == LATEST
    assert reached.position > before


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_file_system_of_64_kib_stops_with_words_and_keeps_the_checkpoint_before(start_lives):
    lives = start_lives("nnUNetFullPlans")
    lives.fold.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(lives.fold)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine mounts nothing")
    try:
        pid = lives.start(MEDMAMBA_SAVE_MINUTES="15")
        _wait_until(lambda: (lives.fold / LATEST).exists())
        os.kill(pid, signal.SIGSTOP)
        _fill(lives.fold / "filler", left=64 * 1024)
        before = {one.path: one.path.read_bytes() for one in candidates(lives.fold)}
        os.kill(pid, signal.SIGCONT)
        assert lives.end() == 75, lives.log()[-4000:]
        assert "cannot be written" in lives.log()
        assert "Make room" in lives.log()
        assert before.keys() == {one.path for one in candidates(lives.fold, thorough=True) if one.problem is None}
        assert any(path.read_bytes() == content for path, content in before.items())
        (lives.fold / "filler").unlink()
        assert "Traceback" not in lives.log()
        pid = lives.start()
        _wait_until(lambda: furthest(lives.fold) > (3, 0))
        os.kill(pid, signal.SIGTERM)
        assert lives.end() == 75
    finally:
        subprocess.run(["umount", "-l", str(lives.fold)], check=False)


def _fill(path: Path, left: int) -> None:
    statistics = os.statvfs(path.parent)
    path.write_bytes(b"x" * (statistics.f_bavail * statistics.f_frsize - left))


def _wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
def test_console_commands_train_on_without_c(start_lives, folder):
    """The real command this time, in a process of its own, begun anew by a scheduler without ``--c``."""
    lives = start_lives("nnUNetAskedPlans")
    arguments = ["901", "3d_fullres", "0", "-p", "nnUNetAskedPlans", "-tr", "nnUNetTrainerVMUNet", "-device", "cpu"]
    before = furthest(lives.fold)
    process = folder.start("nnUNetv2_train", *arguments)
    _wait_until(lambda: furthest(lives.fold) > before)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed[-4000:]
    assert "Continuing from checkpoint_latest.pth" in printed
    assert "it is saved; the same command continues" in printed
