"""progress.json says how far a run is, and whether its process lives."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from medmamba.training.progress import NAME, Progress, is_running, read_progress, write_progress

FULL = Progress(
    epoch=3, iteration=17, epochs=50, state="training", best_dice=0.87, best_epoch=2, seconds_per_epoch=61.5,
    iterations=250, seed=1234,
)  # fmt: skip


@pytest.mark.parametrize(
    "progress", [FULL, Progress(epoch=0, iteration=0, epochs=5, state="stopped")], ids=["full", "short"]
)
def test_what_is_written_is_read(tmp_path, progress):
    write_progress(tmp_path, progress)
    assert read_progress(tmp_path) == progress
    assert progress.saved_time.utcoffset().total_seconds() == 0
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_none_is_none(tmp_path, caplog):
    assert read_progress(tmp_path) is None
    assert caplog.text == ""


CONTENT = asdict(FULL)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00" * 300,
        *(json.dumps({**CONTENT, key: value}) for key, value in [("epoch", "3"), ("state", "asleep"), ("pid", True)]),
        *(json.dumps({**CONTENT, "saved_at": value}) for value in ("yesterday", "2026-01-01T00:00:00")),
        json.dumps({key: value for key, value in CONTENT.items() if key != "epochs"}),
    ],
    # Not by their content: number of the process and time are other ones in every process of the tests.
    ids=[
        *("empty", "cut", "a list", "zeros", "text for a number", "unknown state", "truth for a number"),
        *("no time", "no time zone", "incomplete"),
    ],
)
def test_a_damaged_file_is_a_warning(tmp_path, caplog, text):
    (tmp_path / NAME).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_progress(tmp_path) is None
    assert "is damaged" in caplog.text


def test_what_a_later_version_adds_and_an_earlier_lacks_is_no_damage(tmp_path):
    content = {**{key: value for key, value in CONTENT.items() if key != "seed"}, "mood": "good"}
    (tmp_path / NAME).write_text(json.dumps(content))
    assert read_progress(tmp_path) == replace(FULL, seed=None)


def test_a_process_that_lives_is_running():
    assert is_running(FULL) is True


def test_a_process_that_was_killed_is_not_running():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    progress = Progress(epoch=0, iteration=0, epochs=5, state="training", pid=child.pid)  # saved just now
    assert is_running(progress) is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if os.path.exists("/proc/self/stat"):  # noqa: PTH110
        assert is_running(progress) is False  # although its number is not given back yet
    child.communicate()
    assert is_running(progress) is False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not say when a process began")  # noqa: PTH110
def test_another_process_with_the_same_number_is_not_it():
    assert is_running(replace(FULL, saved_at="2020-01-01T00:00:00+00:00")) is False


def test_another_machine_knows_better():
    assert is_running(replace(FULL, host="elsewhere")) is None


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_a_run_that_said_so_is_not_running(state):
    assert is_running(replace(FULL, state=state)) is False
