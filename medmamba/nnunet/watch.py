"""What a running training of nnU-Net shows: a live line, TensorBoard, and ``progress.json``."""

from __future__ import annotations

import hashlib
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medmamba.diagnostics import measure_step_sizes, token_dynamics
from medmamba.inference.machine import peak_bytes
from medmamba.training.board import Board
from medmamba.training.live import LiveLine
from medmamba.training.progress import Progress, State, best_of, seconds_per_epoch, write_progress

if TYPE_CHECKING:
    from medmamba.nnunet.lasting import LastingTrainer

#: Epochs between two looks at scans and segmentations.
LOOK_EVERY = 10
_GIB = 2**30


class Watch:
    """Shows one training, from the process that writes its files.

    Args:
        trainer: ready to train.
        example: a validation batch, the same one in every life of the training.
    """

    def __init__(self, trainer: LastingTrainer, example: dict[str, Any]) -> None:
        self._trainer = trainer
        self._example = example
        names = class_names(trainer)
        self._board = Board(trainer.folder / "tensorboard", start=trainer.current_epoch, class_names=names)
        self._board.hparams(hparams_of(trainer))
        trainer.logger.loggers.append(self._board)
        self._live = LiveLine(
            (lambda line: None) if trainer.is_quiet else trainer.print_to_log_file,
            epochs=trainer.num_epochs,
            iterations=trainer.num_iterations_per_epoch,
            stream=io.StringIO() if trainer.is_quiet else None,
        )
        self._norms: list[float] = []
        self._parts: dict[str, list[float]] = defaultdict(list)

    def start_epoch(self) -> None:
        """An epoch begins, or goes on after a stop."""
        if self._trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._trainer.device)
        self._live.start(self._trainer.current_epoch, self._trainer.iteration)
        self._norms = []
        self._parts.clear()

    def iteration(self, loss: float, waited_s: float, gradient_norm: float | None) -> None:
        """One iteration is over."""
        self._live.iteration(loss, waited_s)
        if gradient_norm is not None:
            self._norms.append(gradient_norm)
        for name, value in self._trainer.loss_parts.items():
            self._parts[name].append(value)

    def end_of_training_part(self) -> None:
        """The iterations of an epoch are over; its validation follows."""
        times = self._live.finish()
        values = {
            "time/data_wait_s": times.waited_s,
            "time/data_wait_share": times.wait_share,
            "time/iteration_s": times.seconds / max(times.iterations, 1),
        }
        if self._norms:
            values |= {"gradient_norm/mean": statistics.fmean(self._norms), "gradient_norm/max": max(self._norms)}
        values |= {f"loss/train_{name}": statistics.fmean(parts) for name, parts in self._parts.items()}
        peak = peak_bytes()
        if peak is not None:
            values["memory/cpu_peak_gib"] = peak / _GIB
        device = self._trainer.device
        if device.type == "cuda":
            values["memory/gpu_peak_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
        self._board.scalars(values, self._trainer.current_epoch)

    def end_of_epoch(self) -> None:
        """Validation is over; the network is in evaluation mode."""
        epoch = self._trainer.current_epoch
        if epoch % LOOK_EVERY and epoch + 1 != self._trainer.num_epochs:
            return
        try:
            self._look(epoch)
        except torch.OutOfMemoryError:
            self._trainer.print_to_log_file("No GPU memory is left to show scans and a segmentation in TensorBoard.")

    def _look(self, epoch: int) -> None:
        """Scans and segmentation of the first image of the example."""
        network, has_regions = self._trainer.bare_network, self._trainer.label_manager.has_regions
        data = self._example["data"][:1].to(self._trainer.device)
        self._board.dynamics(token_dynamics(network.state_dict()), epoch)
        with _full_precision(self._trainer.device):
            self._board.scans(measure_step_sizes(network, data), epoch)
            prediction = _labels(_first(network(data))[0], has_regions)
        target = _first(self._example["target"])[0]
        reference = _labels(target, True) if has_regions else target[0]
        self._board.overlay(data[0, 0], prediction, reference, epoch, _name(self._example))

    def note(self, state: State) -> None:
        """Write ``progress.json``.

        Raises:
            OSError: the disk is full or not writable.
        """
        write_progress(self._trainer.folder, progress_of(self._trainer, state))

    def stop_showing(self) -> None:
        """The iterations end before their epoch does."""
        self._live.finish()

    def close(self) -> None:
        """Bring to the disk what TensorBoard is to show."""
        self._live.finish()
        self._board.close()


def progress_of(trainer: LastingTrainer, state: State) -> Progress:
    """How far a training is."""
    logged = trainer.logger.get_checkpoint()
    best_dice, best_epoch = best_of([float(value) for value in logged["ema_fg_dice"]])
    return Progress(
        epoch=trainer.current_epoch,
        iteration=trainer.iteration,
        epochs=trainer.num_epochs,
        state=state,
        best_dice=best_dice,
        best_epoch=best_epoch,
        seconds_per_epoch=seconds_per_epoch(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"]),
        iterations=trainer.num_iterations_per_epoch,
        seed=trainer.seed,
    )


def class_names(trainer: LastingTrainer) -> list[str]:
    """Names of the foreground classes or regions, in the order of nnU-Net's Dice per class."""
    labels = {name: value for name, value in trainer.dataset_json["labels"].items() if name != "ignore"}
    foreground = {name: value for name, value in labels.items() if name != "background"}
    if trainer.label_manager.has_regions:
        return list(foreground)
    return sorted(foreground, key=lambda name: int(foreground[name]))


def hparams_of(trainer: LastingTrainer) -> dict[str, bool | str | float | int]:
    """What runs are told apart by: a digest of the plans, and what people look for first."""
    plans, configuration = trainer.plans_manager.plans, trainer.configuration_manager
    text = json.dumps([plans, trainer.configuration_name], sort_keys=True, default=str)
    return {
        "plans_digest": hashlib.sha256(text.encode()).hexdigest()[:12],
        "plans": trainer.plans_manager.plans_name,
        "configuration": trainer.configuration_name,
        "trainer": type(trainer).__name__,
        "fold": str(trainer.fold),
        "batch_size": configuration.batch_size,
        "patch_size": "x".join(map(str, configuration.patch_size)),
        "initial_lr": trainer.initial_lr,
        "num_epochs": trainer.num_epochs,
        "seed": str(trainer.seed),
    }


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _labels(values: Tensor, has_regions: bool) -> Tensor:
    """Labels 0, 1, ... of scores per class, or of scores or masks per region; where regions overlap the last one."""
    if not has_regions:
        return values.argmax(0)
    labels = torch.zeros(values.shape[1:], dtype=torch.long, device=values.device)
    for number, region in enumerate(values, start=1):
        labels[region > 0] = number
    return labels


def _first(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Of deep supervision the finest."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _name(batch: dict[str, Any]) -> str:
    return str(next(iter(batch.get("keys", ["example"]))))
