"""Random numbers as a function of the place, in one process or many."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medmamba.training.seeds import Purpose, SeededBatches, Seeds

WHOLE = st.integers(0, 2**63 - 1)

#: A process with a worker that ignores what it is asked; it is killed, and the worker has to go with it.
PARENT = """
import os, time
from medmamba.training.seeds import Purpose, SeededBatches, Seeds
pid = os.fork()
if pid == 0:
    SeededBatches(iter(()), Seeds(0), Purpose.STEP, 0, 1).set_thread_id(0)
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


def loader():
    while True:
        yield draws()


def batches(seeds: Seeds, first: int, workers: int, count: int, purpose=Purpose.TRAINING_BATCH) -> list:
    """What ``workers`` processes make, read in turns."""
    made = [SeededBatches(loader(), seeds, purpose, first, workers) for _ in range(max(workers, 1))]
    for number, one in enumerate(made):
        one._next += number  # as set_thread_id does, which is for processes of their own
    return [next(made[i % len(made)]) for i in range(count)]


@given(seed=WHOLE, rank=st.integers(0, 7), first=st.integers(0, 10**9), workers=st.integers(0, 5))
def test_workers_make_the_batches_of_one_process(seed, rank, first, workers):
    seeds = Seeds(seed, rank)
    assert batches(seeds, first, workers, 7) == batches(seeds, first, 0, 7)


@given(seed=WHOLE, first=st.integers(0, 10**9), later=st.integers(1, 5))
def test_a_stream_that_begins_later_is_the_rest_of_it(seed, first, later):
    assert batches(Seeds(seed), first, 0, 6)[later:] == batches(Seeds(seed), first + later, 0, 6 - later)


@given(seed=WHOLE, place=st.integers(0, 10**9))
def test_other_seeds_processes_purposes_and_places_draw_other_numbers(seed, place):
    def drawn(seed: int, rank: int, purpose: Purpose, place: int) -> tuple[float, float, float]:
        Seeds(seed, rank).seed_all(purpose, place)
        return draws()

    others = [(seed + 1, 0, Purpose.STEP, place), (seed, 1, Purpose.STEP, place)]
    others += [(seed, 0, Purpose.TRAINING_BATCH, place), (seed, 0, Purpose.STEP, place + 1)]
    own = drawn(seed, 0, Purpose.STEP, place)
    assert own == drawn(seed, 0, Purpose.STEP, place)
    for other in others:
        assert all(a != b for a, b in zip(own, drawn(*other), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_worker_ignores_signals_to_the_job_and_dies_with_its_training():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker, number)
    time.sleep(0.2)
    assert _lives(worker)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while _lives(worker):
        assert time.monotonic() < end
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
