"""Which checkpoint of a run got furthest, and which of them can be gone on with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba.training.checkpoints import UNKNOWN, candidate, candidates


def save(path: Path, epoch: int, iteration: int | None = None, **changes: object) -> Path:
    """A checkpoint as nnU-Net writes it; with an iteration, as our trainers do."""
    content = {
        "network_weights": {"w": torch.arange(5000.0)},
        "optimizer_state": {"state": {}, "param_groups": []},
        "logging": {"ema_fg_dice": [np.float64(0.5)]},
        "current_epoch": epoch,
        **({} if iteration is None else {"medmamba": {"iteration": iteration}}),
        **changes,
    }
    torch.save(content, path)
    return path


def names(folder: Path) -> list[str]:
    return [found.path.stem.removeprefix("checkpoint_") for found in candidates(folder)]


def test_who_got_furthest_comes_first(tmp_path):
    save(tmp_path / "checkpoint_previous.pth", 4)
    save(tmp_path / "checkpoint_latest.pth", 4, 17)
    save(tmp_path / "checkpoint_best.pth", 5)
    assert names(tmp_path) == ["best", "latest", "previous"]
    assert [found.position for found in candidates(tmp_path)] == [(5, 0), (4, 17), (4, 0)]
    assert all(found.problem is None for found in candidates(tmp_path))


def test_of_equals_the_one_of_the_whole_training_comes_first(tmp_path):
    for name in ("best", "previous", "latest", "final"):
        save(tmp_path / f"checkpoint_{name}.pth", 10)
    assert names(tmp_path) == ["final", "latest", "previous", "best"]


def test_the_time_of_a_file_says_nothing(tmp_path):
    save(tmp_path / "checkpoint_latest.pth", 3)
    os.utime(save(tmp_path / "checkpoint_previous.pth", 2), (2e9, 2e9))
    assert names(tmp_path) == ["latest", "previous"]


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99], ids=str)
def test_a_torn_file_comes_last_with_its_problem(tmp_path, keep):
    torn = save(tmp_path / "checkpoint_latest.pth", 9)
    content = torn.read_bytes()
    torn.write_bytes(content[: int(keep * len(content))])
    save(tmp_path / "checkpoint_previous.pth", 8)
    good, bad = candidates(tmp_path)
    assert (good.path.name, good.problem) == ("checkpoint_previous.pth", None)
    assert (bad.path, bad.position) == (torn, (UNKNOWN, UNKNOWN))
    assert "checkpoint_latest.pth is damaged" in str(bad.problem)


def test_a_changed_byte_of_the_weights_is_seen_by_a_thorough_look(tmp_path):
    path = save(tmp_path / "checkpoint_latest.pth", 1)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(100.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert candidate(path).problem is None
    assert "checksum" in str(candidate(path, thorough=True).problem)


def test_an_intact_file_passes_a_thorough_look(tmp_path):
    path = save(tmp_path / "checkpoint_latest.pth", 1, 2)
    assert candidate(path, thorough=True) == candidate(path)
    assert candidate(path).problem is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"current_epoch": None}, "does not say how far it got"),
        ({"optimizer_state": None}, "only prediction can use it"),
        ({"logging": None}, "only prediction can use it"),
        ({"network_weights": {}}, "no network_weights"),
    ],
    ids=str,
)
def test_what_a_training_needs_and_is_not_there_is_a_problem(tmp_path, changes, problem):
    assert problem in str(candidate(save(tmp_path / "checkpoint_best.pth", 1, **changes)).problem)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_a_problem_and_not_run(tmp_path):
    path = save(tmp_path / "checkpoint_best.pth", 1, init_args=Malicious(tmp_path / "was here"))
    assert "would run code" in str(candidate(path).problem)
    assert not (tmp_path / "was here").exists()


def test_a_folder_without_checkpoints_has_none(tmp_path):
    (tmp_path / "checkpoint_latest.pth").mkdir()
    assert candidates(tmp_path) == []
    assert candidates(tmp_path / "missing") == []
