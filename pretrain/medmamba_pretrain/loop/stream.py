"""The crops of a run: a function of (seed, step, number of the crop within the step), whoever computes it.

A step's crops are numbered over all its processes and micro-batches. So two processes with half a batch each see what
one process sees, a step does not depend on the steps before it, and a run continues where it stopped without the state
of any random generator.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medmamba_pretrain.corpus.crops import CropReader
from medmamba_pretrain.corpus.volume import DamagedVolumeError
from medmamba_pretrain.objectives import Choices, Hidden, get_objective
from medmamba_pretrain.recipe import Recipe

from .normalisation import constants_of

#: Volumes that are tried for one crop.
_TRIES = 20
#: Constants of a crop that stands for none.
_UNREADABLE = (0.0, 0.0, 0.0, 1.0)


class Crops(NamedTuple):
    """Crops as they come from the loader; with the batch axis B in front of everything.

    Attributes:
        stored: (1, D, H, W) int16.
        constants: (4,) float64, of :func:`.normalisation.normalise`.
        visible: (*units) bool.
        target: (*units) bool.
        damaged: scalar int64, volumes that could not be read before one could.
    """

    stored: Tensor
    constants: Tensor
    visible: Tensor
    target: Tensor
    damaged: Tensor


class CropStream(Dataset[Crops]):
    """Crops of one process from step ``start`` on, in their order.

    Args:
        reader: of the corpus.
        recipe: of the run.
        units: of a patch.
        start: first step.
        first: number of the process's first crop within each step.
        count: crops of the process per step.

    Attributes:
        count: the same.
    """

    def __init__(
        self, reader: CropReader, recipe: Recipe, units: tuple[int, ...], *, start: int, first: int, count: int
    ) -> None:
        self._reader, self._recipe, self._units = reader, recipe, units
        self._start, self._first, self.count = start, first, count

    def __len__(self) -> int:
        return (self._recipe.steps - self._start) * self.count

    def __getitem__(self, index: int) -> Crops:
        step, number = divmod(index, self.count)
        seeds = (self._recipe.seed, self._start + step, self._first + number)
        return crop_at(self._reader, self._recipe, self._units, np.random.default_rng(seeds))


def loader_of(stream: CropStream, micro_batch: int, workers: int, *, for_gpu: bool) -> DataLoader[Crops]:
    """Batches of at most ``micro_batch`` crops of a stream, in its order, none with crops of two steps.

    Args:
        stream: of this process.
        micro_batch: crops of one batch.
        workers: processes that read; 0: this one.
        for_gpu: into page-locked memory.
    """
    return DataLoader(
        stream,
        batch_sampler=_MicroBatches(len(stream), stream.count, micro_batch),
        num_workers=workers,
        pin_memory=for_gpu,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
    )


class _MicroBatches:
    """Indices of a stream, step by step, each step in pieces of at most ``size``."""

    def __init__(self, length: int, share: int, size: int) -> None:
        self._length, self._share, self._size = length, share, size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self._length, self._share):
            for first in range(start, start + self._share, self._size):
                yield list(range(first, min(first + self._size, start + self._share)))

    def __len__(self) -> int:
        return self._length // self._share * math.ceil(self._share / self._size)


def _ignore_signals(_: int) -> None:
    """Signals are for the process that trains: it ends its workers itself, after the step."""
    for number in (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ())):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def crop_at(reader: CropReader, recipe: Recipe, units: tuple[int, ...], generator: np.random.Generator) -> Crops:
    """One crop of a random volume, with its units, maybe reflected.

    A volume that cannot be read is replaced by another one. Where none of 20 can be read, the crop is all zeros; the
    loop stops long before it matters, because it counts them.
    """
    hidden = _hidden(recipe, units, generator)
    is_reflected = generator.random(len(recipe.flips)) < recipe.flips
    for damaged in range(_TRIES):
        crop = reader.draw(generator)
        try:
            stored = np.flip(reader.read(crop), tuple(np.flatnonzero(is_reflected)))
        except DamagedVolumeError:
            continue
        return _crops(stored, constants_of(reader.record(crop.volume), recipe), hidden, damaged)
    return _crops(np.zeros(reader.size, np.int16), _UNREADABLE, hidden, _TRIES)


def crop_of(
    reader: CropReader, recipe: Recipe, units: tuple[int, ...], generator: np.random.Generator, *, volume: str
) -> Crops:
    """One crop of a volume, with its units, as it is stored; all zeros and counted if it cannot be read."""
    hidden = _hidden(recipe, units, generator)
    try:
        stored = reader.read(reader.place(volume, generator))
    except DamagedVolumeError:
        return _crops(np.zeros(reader.size, np.int16), _UNREADABLE, hidden, 1)
    return _crops(stored, constants_of(reader.record(volume), recipe), hidden, 0)


def _hidden(recipe: Recipe, units: tuple[int, ...], generator: np.random.Generator) -> Hidden:
    choices = Choices(recipe.mask_ratio, recipe.horizon, recipe.fill_routes)
    draws = torch.Generator().manual_seed(int(generator.integers(2**63)))
    return get_objective(recipe.objective).draw(units, choices, draws)


def _crops(stored: NDArray[np.int16], constants: Sequence[float], hidden: Hidden, damaged: int) -> Crops:
    return Crops(
        torch.from_numpy(np.ascontiguousarray(stored))[None],
        torch.tensor(constants, dtype=torch.float64),
        hidden.visible,
        hidden.target,
        torch.tensor(damaged),
    )
