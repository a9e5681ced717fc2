"""Random numbers as a function of the place in a training: what is drawn there does not depend on what ran before.

So nothing has to be kept to continue a training to the same bits, with any number of worker processes.
"""

from __future__ import annotations

import ctypes
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch


class Purpose(IntEnum):
    """What random numbers are for; each purpose has numbers of its own."""

    INITIALISATION = 0
    TRAINING_BATCH = 1
    VALIDATION_BATCH = 2
    STEP = 3
    EXAMPLE = 4


@dataclass(frozen=True)
class Seeds:
    """Seeds of one process of a training.

    Attributes:
        seed: of the training, a whole number of 0 or more.
        rank: number of the process.
    """

    seed: int
    rank: int = 0

    def seed_all(self, purpose: Purpose, place: int = 0) -> None:
        """Seed Python, NumPy and torch, on every device, for what is drawn at ``place``, e.g. an iteration."""
        source = np.random.SeedSequence((self.seed, purpose, self.rank, place))
        first, second, third = (int(word) for word in source.generate_state(3, np.uint64))
        random.seed(first)
        np.random.seed(second % 2**32)  # noqa: NPY002 (the generator that the augmentations of nnU-Net draw from)
        torch.manual_seed(third)


class SeededBatches:
    """The batches of a loader that draws from the global generators, each a function of its number.

    With W workers, worker w makes the batches ``first + w``, ``first + w + W`` and so on: read in turns, they come in
    the order in which one process alone makes them. For the augmenters of batchgenerators, which call
    ``set_thread_id`` in each worker.

    Args:
        loader: makes one batch per ``next``.
        seeds: of this process of the training.
        purpose: of the batches.
        first: number of the first one.
        workers: W; 0 for none, which is the process that trains itself.
    """

    def __init__(self, loader: Iterator[Any], seeds: Seeds, purpose: Purpose, first: int, workers: int) -> None:
        self._loader, self._seeds, self._purpose = loader, seeds, purpose
        self._next, self._stride = first, max(workers, 1)

    def set_thread_id(self, number: int) -> None:
        """Called in worker ``number`` before its first batch."""
        self._next += number
        torch.set_num_threads(1)
        _live_and_die_with_the_training()

    def __iter__(self) -> SeededBatches:
        return self

    def __next__(self) -> Any:
        self._seeds.seed_all(self._purpose, self._next)
        self._next += self._stride
        return next(self._loader)


def _live_and_die_with_the_training() -> None:
    """Signals to the whole job end the training, which ends its workers; if it is killed they go with it (on Linux)."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
