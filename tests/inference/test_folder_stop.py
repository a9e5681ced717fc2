"""Runs that end early: killed at any moment, or asked to stop."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from medmamba.inference.folder import Options, run_folder
from medmamba.inference.reading import read_image
from medmamba.inference.writing import verify_segmentation

FAKE_RUN = Path(__file__).with_name("fake_run.py")
CASES = 4


class Server:
    """Runs in forks of one process that has loaded everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(FAKE_RUN), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, inputs: Path, output: Path, step: int | None = None) -> int:
        """Process id of a run; it kills itself at ``step``."""
        self._process.stdin.write(json.dumps([str(inputs), str(output), step]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """How the run ended: an exit code, or minus the number of a signal."""
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def inputs(tmp_path, write_image) -> Path:
    """Images whose results take some time to compress."""
    for k in range(CASES):
        values = np.random.default_rng(k).integers(0, 101, (48, 48, 48)).astype(np.int16)
        write_image(tmp_path / "in" / f"case_{k}.nii.gz", values=values)
    return tmp_path / "in"


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.nii.gz")} if folder.is_dir() else {}


def done_cases(folder: Path) -> dict[str, dict]:
    """Complete lines of the report about cases that are done, by the name of the output."""
    path = folder / "report.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [record for record in map(json.loads, lines) if record.get("status") == "done"]
    return {record["output"]["file"]: record for record in found}


@pytest.fixture
def reference(inputs, fake, tmp_path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    assert run_folder(inputs, tmp_path / "reference", fake.Threshold(), Options(say=lambda line: None)) == 0
    return results(tmp_path / "reference")


def assert_nothing_is_half(out: Path, inputs: Path, reference: dict[str, bytes]) -> None:
    """Under a final name is what belongs there, and the report promises nothing that is not there."""
    found = results(out)
    assert all(reference[name] == data for name, data in found.items())
    for name, record in done_cases(out).items():
        assert verify_segmentation(out / name, record["output"]["sha256"], read_image(inputs / name)) is None


def assert_a_second_run_completes(server: Server, inputs: Path, out: Path, reference: dict[str, bytes]) -> None:
    verified = set(done_cases(out))
    before = {name: (out / name).stat().st_mtime_ns for name in verified}
    server.start(inputs, out)
    assert server.wait() == 0
    assert results(out) == reference
    assert [path.name for path in out.iterdir() if path.name.endswith(".tmp")] == []
    assert {name: (out / name).stat().st_mtime_ns for name in verified} == before, "verified results were done again"
    assert set(done_cases(out)) == set(reference)


def kill_at_random_moments(count: int, server: Server, inputs: Path, reference: dict[str, bytes], folder: Path) -> None:
    start = time.monotonic()
    server.start(inputs, folder / "undisturbed")
    assert server.wait() == 0
    length = time.monotonic() - start
    moments = random.Random(6)
    killed = 0
    for k in range(10 * count):
        out = folder / f"out{k}"
        process = server.start(inputs, out)
        time.sleep(moments.uniform(0, length))
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        if server.wait() == 0:
            length *= 0.8  # it ended before it could be killed
            continue
        killed += 1
        assert_nothing_is_half(out, inputs, reference)
        assert_a_second_run_completes(server, inputs, out, reference)
        if killed == count:
            return
    pytest.fail(f"only {killed} runs could be killed before their end")


def test_kill_9_at_8_random_moments_leaves_nothing_half_and_the_rerun_completes(server, inputs, reference, tmp_path):
    kill_at_random_moments(8, server, inputs, reference, tmp_path)


@pytest.mark.slow
def test_kill_9_at_50_random_moments_leaves_nothing_half_and_the_rerun_completes(server, inputs, reference, tmp_path):
    kill_at_random_moments(50, server, inputs, reference, tmp_path)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_9_at_every_step_leaves_nothing_half_and_the_rerun_completes(server, inputs, reference, tmp_path, stride):
    """Steps are what the process does to names of files; after the last one it ends by itself."""
    step, status = 1, -signal.SIGKILL
    while status == -signal.SIGKILL:
        out = tmp_path / f"out{step}"
        server.start(inputs, out, step)
        status = server.wait()
        assert status in (-signal.SIGKILL, 0)
        assert_nothing_is_half(out, inputs, reference)
        assert_a_second_run_completes(server, inputs, out, reference)
        step += stride
    assert step > 40, "hardly any step was tried"


def test_runs_that_are_killed_again_and_again_get_to_the_end(server, inputs, reference, tmp_path):
    """Every run dies at the same step of its life; each must still leave more than it found."""
    out, runs, status = tmp_path / "out", 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        server.start(inputs, out, 30)
        status = server.wait()
        assert_nothing_is_half(out, inputs, reference)
        runs += 1
        assert runs < 30, "no progress"
    assert runs > 1, "never killed"
    assert results(out) == reference


@pytest.fixture
def start(inputs, tmp_path) -> Iterator[Callable[[float], subprocess.Popen]]:
    """Starts a run in a process of its own, with a pause per case, and waits until it predicts the second one."""
    processes = []

    def call(pause_s: float) -> subprocess.Popen:
        command = [sys.executable, str(FAKE_RUN), str(inputs), str(tmp_path / "out"), str(pause_s)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == f"{CASES} cases\n"
        assert process.stdout.readline().startswith(f"[1/{CASES}] case_0: done")
        return process

    yield call
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_request_to_stop_drops_the_current_case_and_exits_75(start, fake, inputs, reference, tmp_path, number):
    process = start(2.0)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors == ""
    out = tmp_path / "out"
    assert set(results(out)) == {"case_0.nii.gz"}
    assert "1 done, 3 left; stopped as asked, start the same command again to go on" in printed
    assert [path.name for path in out.iterdir() if path.name.endswith(".tmp")] == []
    end = json.loads((out / "report.jsonl").read_text().splitlines()[-1])
    assert (end["record"], end["exit_code"], end["done"], end["left"]) == ("end", 75, 1, 3)
    predictor = fake.Threshold()
    assert run_folder(inputs, out, predictor, Options(say=lambda line: None)) == 0
    assert predictor.predicted == 3
    assert results(out) == reference
    # Asked for, so nobody needs to wonder what the case did to the process.
    assert all(record["notes"] == [] for record in done_cases(out).values())


def test_an_interrupt_goes_through_and_the_next_run_goes_on(inputs, fake, reference, tmp_path):
    """What a second Ctrl-C raises, wherever it arrives."""

    class Interrupted(fake.Threshold):
        def predict(self, channels, *, should_stop):
            if self.predicted:
                raise KeyboardInterrupt
            return super().predict(channels, should_stop=should_stop)

    quiet = Options(say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        run_folder(inputs, tmp_path / "out", Interrupted(), quiet)
    assert_nothing_is_half(tmp_path / "out", inputs, reference)
    assert run_folder(inputs, tmp_path / "out", fake.Threshold(), quiet) == 0
    assert results(tmp_path / "out") == reference


def test_a_reader_that_leaves_does_not_end_the_run(inputs, reference, tmp_path):
    command = [sys.executable, str(FAKE_RUN), str(inputs), str(tmp_path / "out"), "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 0, errors
    assert results(tmp_path / "out") == reference
