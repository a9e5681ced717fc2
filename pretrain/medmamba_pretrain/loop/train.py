"""A run: from a recipe and a corpus to an encoder, again and again from where it stopped."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from medmamba.command import CommandError
from medmamba.stop import EXIT_INTERRUPTED, StopRequest
from medmamba_pretrain.corpus.crops import CropReader
from medmamba_pretrain.corpus.store import Store
from medmamba_pretrain.model import decay_statistics
from medmamba_pretrain.recipe import Recipe

from .agreement import check_corpus, check_same_run, share_of_batch
from .checkpoints import Checkpoints
from .export import write_run_encoder
from .learner import Learner
from .monitor import Monitor
from .processes import Processes
from .stream import Crops, CropStream, loader_of
from .validation import Validation, held_out

_log = logging.getLogger(__name__)

#: Damaged volumes that are always accepted, so that a short run does not stop for one.
_FEW = 4
ENCODER = "encoder.safetensors"


@dataclass(frozen=True)
class Machine:
    """How a run is computed; it changes no result but for rounding.

    Attributes:
        workers: processes of this one that read crops; 0: this one reads.
        micro_batch: crops of one forward pass; 0: all of the process's share of a step.
    """

    workers: int = 0
    micro_batch: int = 0


def run(recipe: Recipe, corpus: Path, out: Path, *, processes: Processes, machine: Machine, stop: StopRequest) -> int:
    """Train until the recipe's last step or until ``stop`` asks, and write the encoder.

    Args:
        recipe: what to do.
        corpus: folder of the store.
        out: folder for checkpoints, TensorBoard and the encoder; if there is a run in it, it goes on.
        processes: this one among all.
        machine: how to compute.
        stop: asks to end after the current step.

    Returns:
        0, or 75 if it stopped early.

    Raises:
        CommandError: recipe, corpus, machine and the run in ``out`` do not fit together; too many damaged volumes; the
            loss is not finite; the disk is full (exit code 75).
    """
    return Run(recipe, corpus, out, processes, machine).go(stop)


class Run:
    """One process's part of a run. Arguments as of :func:`run`."""

    def __init__(self, recipe: Recipe, corpus: Path, out: Path, processes: Processes, machine: Machine) -> None:
        self._recipe, self._out, self._processes, self._machine = recipe, out, processes, machine
        self._store = Store(corpus)
        check_corpus(recipe, self._store)
        self._share = share_of_batch(recipe, processes)
        self._micro_batch = machine.micro_batch or self._share
        self._held_out = held_out(self._store, recipe.validation_patients)
        try:
            self._reader = CropReader(self._store, recipe.patch_size, recipe.weights, without=self._held_out)
        except ValueError as error:
            raise CommandError(str(error)) from error
        self._learner = Learner(recipe, processes)
        self._checkpoints = Checkpoints(out)
        self._step, self._damaged = 0, 0
        self._resume()

    def go(self, stop: StopRequest) -> int:
        """See :func:`run`."""
        with ExitStack() as stack:
            monitor = validation = None
            if self._processes.is_first:
                self._write_encoder()  # what cannot be written in the end shall fail now
                folder = self._out / "tensorboard"
                monitor = stack.enter_context(Monitor(folder, start=self._step, steps=self._recipe.steps))
                validation = self._validation()
            batches = self._batches()
            while self._step < self._recipe.steps:
                if self._is_asked(stop):
                    self._save()
                    self._tell("stopped at step %d; the same command continues", self._step)
                    return EXIT_INTERRUPTED
                self._one_step(batches, monitor)
                if self._is_due(self._recipe.validate_every) and validation is not None and monitor is not None:
                    monitor.validation(self._step, validation.run(self._learner.model))
                if self._is_due(self._recipe.save_every):
                    self._save()
        self._tell("wrote %s", self._out / ENCODER)
        return 0

    def _one_step(self, batches: Iterator[Crops], monitor: Monitor | None) -> None:
        started = time.monotonic()
        micro_batches = [next(batches) for _ in range(math.ceil(self._share / self._micro_batch))]
        waited = time.monotonic() - started
        here = [sum(float(part.sum()) for part in parts) for parts in _counted(micro_batches)]
        targets, damaged = (int(count) for count in self._processes.sum(here))
        self._count_damaged(damaged)
        scalars = self._learner.step(self._step, micro_batches, targets)
        if monitor is not None:
            scalars["data/damaged"] = self._damaged
            scalars |= {f"fill/{name}": value for name, value in decay_statistics(self._learner.model.fill).items()}
            monitor.step(self._step, scalars, crops=self._recipe.batch_size, waited_s=waited)
        self._step += 1

    def _count_damaged(self, damaged: int) -> None:
        self._damaged += damaged
        crops = (self._step + 1) * self._recipe.batch_size
        if self._damaged > max(_FEW, self._recipe.max_substituted * crops):
            raise CommandError(
                f"{self._damaged} of {crops} crops had to come from other volumes because the files of the drawn ones "
                f"are damaged or missing, more than max_substituted = {self._recipe.max_substituted:g}; `medmamba "
                f"pretrain corpus {self._store.folder} --verify` names them, ingesting again restores them",
                exit_code=1,
            )

    def _batches(self) -> Iterator[Crops]:
        recipe, units = self._recipe, self._learner.model.units
        first = self._processes.rank * self._share
        stream = CropStream(self._reader, recipe, units, start=self._step, first=first, count=self._share)
        for_gpu = self._processes.device.type == "cuda"
        return iter(loader_of(stream, self._micro_batch, self._machine.workers, for_gpu=for_gpu))

    def _validation(self) -> Validation | None:
        if not self._held_out:
            return None
        learner = self._learner
        return Validation(self._reader, self._held_out, self._recipe, learner.model.units, learner.precision)

    def _is_due(self, every: int) -> bool:
        return self._step % every == 0 or self._step == self._recipe.steps

    def _is_asked(self, stop: StopRequest) -> bool:
        """Whether any process was asked to stop: all end after the same step."""
        return bool(self._processes.sum([float(stop.is_asked)])[0])

    def _tell(self, text: str, *values: object) -> None:
        if self._processes.is_first:
            _log.info(text, *values)

    def _save(self) -> None:
        if self._processes.is_first:
            self._write_encoder()
            facts = {"recipe": self._recipe.to_dict(), "corpus": self._store.digest, "damaged": self._damaged}
            self._checkpoints.save(self._step, {**self._learner.state(), **facts})

    def _write_encoder(self) -> None:
        encoder = self._learner.model.encoder.encoder
        write_run_encoder(self._out / ENCODER, encoder, self._recipe, self._store, self._step)

    def _resume(self) -> None:
        """Load the newest checkpoint that the first process can read, into all."""
        state = self._processes.from_first(self._checkpoints.latest() if self._processes.is_first else None)
        if state is None:
            return
        check_same_run(state, self._recipe, self._store, self._out)
        self._learner.load(state)
        self._step, self._damaged = state["step"], state["damaged"]
        self._tell("continuing at step %d of %d", self._step, self._recipe.steps)


def _counted(batches: list[Crops]) -> tuple[list[Tensor], list[Tensor]]:
    return [crops.target for crops in batches], [crops.damaged for crops in batches]
