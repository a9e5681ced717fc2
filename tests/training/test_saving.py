"""Checkpoints: complete under their name, and one in reserve, whatever happens in between."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medmamba.training.saving import recover, save, save_in_ring

SAVER = """
import sys, torch
from medmamba.training.saving import save_in_ring
for number in range(10**6):
    content = {"number": number, "x": torch.full((50_000,), number)}
    save_in_ring(f"{sys.argv[1]}/latest.pth", f"{sys.argv[1]}/previous.pth", content)
    if number == 2:
        print("ready", flush=True)
"""


def content(number: int) -> dict:
    return {"number": number, "x": torch.full((1000,), number)}


def numbers(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["number"] for path in sorted(folder.glob("*.pth"))}


def ring(folder: Path, number: int) -> None:
    save_in_ring(folder / "latest.pth", folder / "previous.pth", content(number))


def test_the_ring_holds_the_last_two(tmp_path):
    for number in range(4):
        ring(tmp_path, number)
        assert numbers(tmp_path) == {"latest.pth": number} | ({"previous.pth": number - 1} if number else {})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("has_links", [True, False])
def test_a_full_disk_leaves_both_as_they_are(tmp_path, monkeypatch, has_links):
    def no_link(*_):
        raise OSError(errno.EPERM, "no links")

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")

    if not has_links:
        monkeypatch.setattr(os, "link", no_link)
    for number in range(3):
        ring(tmp_path, number)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="unexpected pos") as caught:
            ring(tmp_path, 3)
    assert caught.value.errno == errno.ENOSPC
    assert numbers(tmp_path) == {"latest.pth": 2, "previous.pth": 1}
    assert len(list(tmp_path.iterdir())) == 2
    ring(tmp_path, 4)
    assert numbers(tmp_path) == {"latest.pth": 4, "previous.pth": 2}


def test_without_links_a_kill_in_between_loses_nothing(tmp_path):
    """The file has just lost its name, which the next one is to get."""
    ring(tmp_path, 0)
    (tmp_path / "latest.pth").rename(tmp_path / ".previous.pth.next.tmp")
    recover(tmp_path / "latest.pth", tmp_path / "previous.pth")
    assert numbers(tmp_path) == {"latest.pth": 0}
    ring(tmp_path, 1)
    assert numbers(tmp_path) == {"latest.pth": 1, "previous.pth": 0}


def test_a_real_limit_of_file_size_is_a_full_disk(tmp_path):
    code = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{SAVER}"
    ring(tmp_path, 7)

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], preexec_fn=small_files, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 1
    assert "OSError" in process.stderr
    assert numbers(tmp_path) == {"latest.pth": 7}
    assert len(list(tmp_path.iterdir())) == 1


def test_kills_at_any_moment_leave_one_that_loads_and_lose_at_most_one(tmp_path):
    draw = random.Random(0)
    before = -1
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = numbers(tmp_path)
        assert there["latest.pth"] - there["previous.pth"] in (1, 2)
        assert there["latest.pth"] >= 2
        before = there["latest.pth"]
    assert before >= 2


def test_what_cannot_be_read_back_is_not_moved(tmp_path, monkeypatch):
    save(tmp_path / "latest.pth", content(0))
    monkeypatch.setattr(torch, "save", lambda content, path: Path(path).write_bytes(b"PK half"))
    with pytest.raises(OSError, match="cannot be read back"):
        save(tmp_path / "latest.pth", content(1))
    assert numbers(tmp_path) == {"latest.pth": 0}
