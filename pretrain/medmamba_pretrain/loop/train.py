"""A run: from a recipe and a corpus to an encoder, again and again from where it stopped."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medmamba.command import CommandError
from medmamba.networks import create_network
from medmamba_kernels import BadStepError
from medmamba_pretrain.corpus.crops import CropReader
from medmamba_pretrain.corpus.store import Store
from medmamba_pretrain.masking import mask_at
from medmamba_pretrain.model import Pretraining, decay_statistics
from medmamba_pretrain.recipe import Recipe

from .agreement import check_corpus, check_same_run, share_of_batch
from .checkpoints import Checkpoints
from .export import write_run_encoder
from .monitor import Monitor
from .normalisation import normalise
from .precision import Precision
from .processes import Processes
from .schedule import learning_rate, optimizer_of, set_learning_rate
from .stop import StopRequest
from .stream import Crops, CropStream, loader_of
from .validation import Validation, held_out

_log = logging.getLogger(__name__)

#: Damaged volumes that are always accepted, so that a short run does not stop for one.
_FEW = 4
ENCODER = "encoder.safetensors"
RESUMABLE = 75


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
        self._precision = Precision.of(recipe, processes.device)
        self._share = share_of_batch(recipe, processes)
        self._micro_batch = machine.micro_batch or self._share
        self._held_out = held_out(self._store, recipe.validation_patients)
        try:
            self._reader = CropReader(self._store, recipe.patch_size, recipe.weights, without=self._held_out)
            torch.manual_seed(recipe.seed)
            network = create_network(recipe.network, 1, 2, **recipe.network_arguments)
            self._model = Pretraining(network, recipe).to(processes.device, self._precision.dtype)
        except (ValueError, TypeError, KeyError) as error:
            raise CommandError(f"recipe: {error.args[0] if error.args else error}") from error
        self._optimizer = optimizer_of(self._model, recipe)
        self._step, self._damaged = 0, 0
        self._checkpoints = Checkpoints(out)
        self._resume()
        self._trained: nn.Module = self._model
        if processes.count > 1:
            # Without device_ids, units stay on the CPU, where looking at them does not wait for the GPU.
            self._trained = DistributedDataParallel(self._model)

    def go(self, stop: StopRequest) -> int:
        """See :func:`run`."""
        with ExitStack() as stack:
            monitor = None
            if self._processes.is_first:
                self._write_encoder()  # what cannot be written in the end shall fail now
                monitor = stack.enter_context(
                    Monitor(self._out / "tensorboard", start=self._step, steps=self._recipe.steps)
                )
            validation = self._validation() if monitor is not None and self._held_out else None
            batches = self._batches()
            while self._step < self._recipe.steps:
                if self._is_asked(stop):
                    self._save()
                    if self._processes.is_first:
                        _log.info("stopped at step %d; the same command continues", self._step)
                    return RESUMABLE
                self._one_step(batches, monitor)
                is_last = self._step == self._recipe.steps
                if (
                    validation is not None
                    and monitor is not None
                    and (self._step % self._recipe.validate_every == 0 or is_last)
                ):
                    loss, pictures = validation.run(self._model)
                    seen = mask_at(validation.visible, self._recipe.patch_size).unsqueeze(1)
                    monitor.validation(self._step, loss, validation.image, seen, pictures)
                if self._step % self._recipe.save_every == 0 or is_last:
                    self._save()
        if self._processes.is_first:
            _log.info("wrote %s", self._out / ENCODER)
        return 0

    def _one_step(self, batches: Iterator[Crops], monitor: Monitor | None) -> None:
        recipe, step = self._recipe, self._step
        # For layers that draw by themselves, such as stochastic depth: a step does not depend on those before it.
        torch.manual_seed(int(np.random.SeedSequence((recipe.seed, step, self._processes.rank)).generate_state(1)[0]))
        started = time.monotonic()
        micro_batches = [next(batches) for _ in range(math.ceil(self._share / self._micro_batch))]
        waited = time.monotonic() - started
        count, damaged = self._processes.sum(
            [
                sum(int(crops.target.sum()) for crops in micro_batches),
                sum(int(crops.damaged.sum()) for crops in micro_batches),
            ]
        )
        self._count_damaged(int(damaged))
        rate = learning_rate(step, recipe)
        set_learning_rate(self._optimizer, rate)
        loss = 0.0
        for i, crops in enumerate(micro_batches):
            with self._unless_last(i, len(micro_batches)):
                loss += self._backward(crops, int(count))
        (loss,) = self._processes.sum([loss])
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), recipe.clip_norm))
        if not math.isfinite(norm):
            raise _diverged(step, f"gradients are not finite, the loss is {loss:g}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        if monitor is not None:
            scalars = {"train/loss": loss, "train/lr": rate, "train/gradient_norm": norm, "data/damaged": self._damaged}
            decay = {f"fill/{name}": value for name, value in decay_statistics(self._model.fill).items()}
            monitor.step(step, {**scalars, **decay}, crops=recipe.batch_size, waited_s=waited)

    def _backward(self, crops: Crops, count: int) -> float:
        """Loss of one micro-batch, its gradients added. The sum over all is the mean over a step's target units."""
        device = self._processes.device
        stored, constants = (part.to(device, non_blocking=True) for part in (crops.stored, crops.constants))
        image = normalise(stored, constants, self._precision.dtype)
        try:
            with self._precision.autocast():
                loss = self._trained(image, crops.visible, crops.target, count)
        except BadStepError as error:  # a scan on the CPU looks at its step sizes
            raise _diverged(self._step, str(error)) from error
        # DistributedDataParallel takes the mean over the processes of what is to be summed.
        (loss * self._processes.count).backward()
        return float(loss.detach())

    def _unless_last(self, i: int, count: int) -> Any:
        """Processes exchange gradients with the last micro-batch only."""
        if isinstance(self._trained, DistributedDataParallel) and i + 1 < count:
            return self._trained.no_sync()
        return nullcontext()

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
        first = self._processes.rank * self._share
        stream = CropStream(
            self._reader, self._recipe, self._model.units, start=self._step, first=first, count=self._share
        )
        return iter(
            loader_of(stream, self._micro_batch, self._machine.workers, for_gpu=self._processes.device.type == "cuda")
        )

    def _validation(self) -> Validation:
        return Validation(self._reader, self._held_out, self._recipe, self._model.units, self._precision)

    def _is_asked(self, stop: StopRequest) -> bool:
        """Whether any process was asked to stop: all end after the same step."""
        return bool(self._processes.sum([float(stop.is_asked)])[0])

    def _save(self) -> None:
        if self._processes.is_first:
            self._write_encoder()
            state = {
                "model": self._model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "recipe": self._recipe.to_dict(),
                "corpus": self._store.digest,
                "damaged": self._damaged,
            }
            self._checkpoints.save(self._step, state)

    def _write_encoder(self) -> None:
        write_run_encoder(self._out / ENCODER, self._model.encoder.encoder, self._recipe, self._store, self._step)

    def _resume(self) -> None:
        """Load the newest checkpoint that the first process can read, into all."""
        state = self._processes.from_first(self._checkpoints.latest() if self._processes.is_first else None)
        if state is None:
            return
        check_same_run(state, self._recipe, self._store, self._out)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step, self._damaged = state["step"], state["damaged"]
        if self._processes.is_first:
            _log.info("continuing at step %d of %d", self._step, self._recipe.steps)


def _diverged(step: int, what: str) -> CommandError:
    return CommandError(
        f"training diverged at step {step}: {what}; weights from before are in the last checkpoint. Start again in "
        "another --out with a lower lr, a longer warm-up, or precision=float32",
        exit_code=1,
    )
