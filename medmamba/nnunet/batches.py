"""Batches of nnU-Net's loaders in a fixed order, made by processes beside the training or by the training itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter

from medmamba.training.seeds import SeededBatches

_PROCESSES = "nnUNet_n_proc_DA"


@contextmanager
def no_workers() -> Iterator[None]:
    """Within ``with``, nnU-Net makes its loaders without processes."""
    before = os.environ.get(_PROCESSES)
    os.environ[_PROCESSES] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PROCESSES]
        else:
            os.environ[_PROCESSES] = before


def in_workers(batches: SeededBatches, workers: int, *, pin: bool) -> Any:
    """An iterator over ``batches``, in order.

    Args:
        workers: processes that make them; 0 for none, as ``batches`` was told.
        pin: keep them where a GPU copies them from at once.
    """
    if workers == 0:
        return SingleThreadedAugmenter(batches, None)
    return MultiThreadedAugmenter(
        batches,
        None,
        workers,
        num_cached_per_queue=2,
        seeds=[0] * workers,  # drawn anew for every batch
        pin_memory=pin,
        wait_time=0.002,
    )


def close(loader: Any) -> None:
    """End the processes of an iterator of :func:`in_workers`, if it has any."""
    if isinstance(loader, MultiThreadedAugmenter):
        loader._finish()
