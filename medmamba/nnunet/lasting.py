"""nnU-Net's training, made to survive: ended at any iteration, it goes on there, to the same bits on a CPU.

The folder and the names of nnU-Net stay: ``checkpoint_latest.pth`` (with ``checkpoint_previous.pth`` in reserve),
``checkpoint_best.pth`` and ``checkpoint_final.pth``. A training that was begun is continued by the same command, with
or without ``--c``; the way to begin anew is ``MEDMAMBA_RESTART=1``.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn
from torch._dynamo import OptimizedModule

from medmamba.nnunet.batches import close, in_workers, no_workers
from medmamba.nnunet.rehearsal import rehearse
from medmamba.nnunet.resume import best_so_far, check_same_training, move_aside, newest, remove_leftovers
from medmamba.nnunet.watch import Watch
from medmamba.stop import EXIT_INTERRUPTED, StopRequest, exit_when_asked
from medmamba.training.checkpoints import FINAL, LATEST, PREVIOUS
from medmamba.training.progress import State
from medmamba.training.saving import save, save_in_ring
from medmamba.training.seeds import Purpose, SeededBatches, Seeds
from medmamba.training.settings import minutes_between_saves, seed_of_new_training, wants_rehearsal, wants_restart
from medmamba.weights import read_training

#: A disk that is full, beyond a quota or a limit, or not writable.
_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class LastingTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a loop that can be ended and continued at every iteration.

    Random numbers are a function of the seed and the place in the training (:mod:`medmamba.training.seeds`), so a
    continued training sees the batches that it would have seen.

    Attributes:
        save_minutes: between two ``checkpoint_latest`` within an epoch; those of ``save_every`` epochs come as well.
        rehearses: before epoch 0, unless ``MEDMAMBA_REHEARSAL=0``.
        is_quiet: whether the iterations of an epoch are not shown while it goes.
        seed: of the training: ``MEDMAMBA_SEED``, or a random one, or that of the checkpoint.
        iteration: iterations of the current epoch that are done.
        waiting, waiting_to_validate: batches that come before those of the loaders.
        gradient_norm: of the last iteration as the optimizer saw it, clipped at nnU-Net's 12; None if not measured.
        loss_parts: what the loss of the last iteration was made of, by name; empty where it has no parts.
        watch: what shows the training, in the first process and while it trains.
    """

    _best_ema: float | None

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature of nnU-Net)
    ) -> None:
        self._is_told_to_continue = bool(plans["continue_training"])
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.seed = seed_of_new_training()
        self.save_minutes = minutes_between_saves()
        self.rehearses = wants_rehearsal()
        self.is_quiet = False
        self.iteration = 0
        self.waiting: list[dict[str, Any]] = []
        self.waiting_to_validate: list[dict[str, Any]] = []
        self._losses: list[Any] = []
        self._example: dict[str, Any] = {}
        self.gradient_norm: float | None = None
        self.loss_parts: dict[str, float] = {}
        self.watch: Watch | None = None
        self._is_loaded = False
        self._saved_at = time.monotonic()

    def initialize(self) -> None:
        """nnU-Net's, with initial weights that follow from the seed."""
        if not self.was_initialized:
            self.seed = _from_first(self.seed) if self.is_ddp else self.seed
            self.seeds.seed_all(Purpose.INITIALISATION)
        super().initialize()

    @property
    def seeds(self) -> Seeds:
        """Of this process."""
        return Seeds(self.seed, self.local_rank)

    @property
    def bare_network(self) -> nn.Module:
        """The network inside DistributedDataParallel and torch.compile."""
        network = self.network
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    @property
    def folder(self) -> Path:
        """Of the fold."""
        return Path(self.output_folder)

    # The loop

    def run_training(self) -> None:
        """Train to the last epoch, from where a training of the same plans in this folder has stopped.

        Raises:
            SystemExit: with code 75, after SIGTERM, SIGUSR1 or Ctrl-C, or when the disk is full: what was reached is
                saved, and the same command continues there.
        """
        with StopRequest() as stop, self._stopped_by_a_full_disk():
            if self.local_rank == 0:
                remove_leftovers(self.folder)
            if not self._is_loaded:
                self._continue_or_begin()
            if self.current_epoch >= self.num_epochs and (self.folder / FINAL).is_file():
                self.print_to_log_file(f"All {self.num_epochs} epochs are done.")
                return
            try:
                self.on_train_start()
                if self.rehearses and self.current_epoch == self.iteration == 0:
                    rehearse(self)
                self._begin_to_show()
                self._saved_at = time.monotonic()
                for _ in range(self.current_epoch, self.num_epochs):
                    self._run_epoch(stop)
                self.on_train_end()
                self._note("finished")
            except BaseException:
                self._end_showing()
                raise
            finally:
                self._close_loaders()
            if stop.is_asked:
                raise SystemExit(EXIT_INTERRUPTED)

    def _run_epoch(self, stop: StopRequest) -> None:
        self.on_epoch_start()
        self.on_train_epoch_start()
        self._watching(Watch.start_epoch)
        while self.iteration < self.num_iterations_per_epoch:
            self._stop_or_save(stop)
            started = time.monotonic()
            batch = self.next_batch()
            waited_s = time.monotonic() - started
            self.seeds.seed_all(Purpose.STEP, self._place)
            self._losses.append(self.train_step(batch)["loss"])
            self.iteration += 1
            if self.watch is not None:
                self.watch.iteration(float(self._losses[-1]), waited_s, self.gradient_norm)
        self.on_train_epoch_end([{"loss": loss} for loss in self._losses])
        self._watching(Watch.end_of_training_part)
        with torch.no_grad():
            self.on_validation_epoch_start()
            results = []
            for _ in range(self.num_val_iterations_per_epoch):
                self._stop_or_save(stop)
                results.append(self.validation_step(_next(self.waiting_to_validate, self.dataloader_val)))
            self.on_validation_epoch_end(results)
        self._watching(Watch.end_of_epoch)
        self.on_epoch_end()
        self.iteration, self._losses = 0, []
        self._note("training")

    def _begin_to_show(self) -> None:
        if self.local_rank == 0:
            self.watch = Watch(self, self._example)

    def _watching(self, show: Callable[[Watch], None]) -> None:
        if self.watch is not None:
            show(self.watch)

    def _note(self, state: State) -> None:
        self._watching(lambda watch: watch.note(state))

    def _end_showing(self) -> None:
        self._watching(Watch.close)
        self.watch = None

    def next_batch(self) -> dict[str, Any]:
        """The next batch to train on."""
        return _next(self.waiting, self.dataloader_train)

    @property
    def _place(self) -> int:
        return int(self.current_epoch * self.num_iterations_per_epoch + self.iteration)

    def _stop_or_save(self, stop: StopRequest) -> None:
        """In all processes of a training alike, because each of them may be the one that was asked."""
        is_due = time.monotonic() - self._saved_at >= 60 * self.save_minutes
        is_asked, is_due = self._any_process(stop.is_asked, is_due)
        if is_asked or is_due:
            self._save_within_epoch()
        if is_asked:
            self._watching(Watch.stop_showing)
            self._note("stopped")
            if self.is_ddp:
                dist.barrier()  # who starts the processes ends all of them when the first one leaves
            where = f"epoch {self.current_epoch}, iteration {self.iteration}"
            saved = "checkpointing is disabled, it is lost" if self.disable_checkpointing else "it is saved"
            self.print_to_log_file(f"Asked to stop at {where}: {saved}; the same command continues.")
            raise SystemExit(EXIT_INTERRUPTED)

    def _any_process(self, *answers: bool) -> tuple[bool, ...]:
        if not self.is_ddp:
            return answers
        numbers = torch.tensor([float(answer) for answer in answers], device=self.device)
        dist.all_reduce(numbers)
        return tuple(number > 0 for number in numbers.tolist())

    @contextmanager
    def _stopped_by_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Who writes into an open file gets an error without its name.
            is_ours = str(error.filename or self.folder).startswith(str(self.folder))
            if not is_ours or error.errno not in _NO_MORE:
                raise
            self.print_to_log_file(
                f"{error.filename or self.folder} cannot be written ({error.strerror}). The checkpoints that are there "
                "are whole. Make room, or make the folder writable, and give the same command again to continue."
            )
            raise SystemExit(EXIT_INTERRUPTED) from error

    def _close_loaders(self) -> None:
        for loader in (self.dataloader_train, self.dataloader_val):
            close(loader)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's; SIGTERM, SIGUSR1 and Ctrl-C end it with code 75, and the same command validates again."""
        with exit_when_asked():
            try:
                super().perform_actual_validation(save_probabilities)
            finally:
                self._end_showing()

    # Batches

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders, giving batches that follow from the seed and their number, in order."""
        with no_workers():
            training, validation = super().get_dataloaders()
        self.seeds.seed_all(Purpose.EXAMPLE)
        self._example = next(validation.data_loader)
        processes, pin = get_allowed_n_proc_DA(), self.device.type == "cuda"
        first = self.current_epoch * self.num_val_iterations_per_epoch
        batches = SeededBatches(training.data_loader, self.seeds, Purpose.TRAINING_BATCH, self._place, processes)
        half = -(-processes // 2)
        to_validate = SeededBatches(validation.data_loader, self.seeds, Purpose.VALIDATION_BATCH, first, half)
        return in_workers(batches, processes, pin=pin), in_workers(to_validate, half, pin=pin)

    # Checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """Write what nnU-Net asks for, between two epochs; the old file stays until the new one is complete.

        Raises:
            OSError: the disk is full or not writable.
        """
        self._save(Path(filename), self.current_epoch + 1, 0)

    def _save_within_epoch(self) -> None:
        if self.current_epoch or self.iteration:
            self._save(self.folder / LATEST, self.current_epoch, self.iteration, self._losses_of_all())

    def _losses_of_all(self) -> list[torch.Tensor]:
        """Those of the current epoch, by process."""
        own = torch.from_numpy(np.array(self._losses))
        if not self.is_ddp:
            return [own]
        box: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(box, own)
        return box

    def _save(self, path: Path, epoch: int, iteration: int, losses: Sequence[torch.Tensor] = ()) -> None:
        if path.name == LATEST:
            self._saved_at = time.monotonic()  # in all processes, though one writes
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        content = self.checkpoint(epoch, iteration, losses)
        if path.name == LATEST:
            save_in_ring(path, path.with_name(PREVIOUS), content)
        else:
            save(path, content)
        if path.name == FINAL:
            path.with_name(PREVIOUS).unlink(missing_ok=True)  # nnU-Net removes the latest

    def checkpoint(self, epoch: int, iteration: int, losses: Sequence[torch.Tensor] = ()) -> dict[str, Any]:
        """Content of a checkpoint: nnU-Net's keys, and ``medmamba`` with what else a continued training needs.

        Args:
            epoch, iteration: to go on with.
            losses: of this epoch so far, by process.
        """
        logged = {name: [_plain(value) for value in values[:epoch]] for name, values in self._logged().items()}
        return {
            "network_weights": self.bare_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": logged,
            "_best_ema": _plain(self._best_ema),
            "current_epoch": epoch,
            "init_args": self.my_init_kwargs,
            # Prediction only needs a trainer that builds what the plans say, and the stock one does.
            "trainer_name": nnUNetTrainer.__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "medmamba": {**self.facts(), "seed": self.seed, "iteration": iteration, "losses": list(losses)},
        }

    def _logged(self) -> dict[str, list[Any]]:
        logged: dict[str, list[Any]] = self.logger.get_checkpoint()
        return logged

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says about its training: plain values."""
        return {"trainer": type(self).__name__}

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Continue a training, or take its weights for validation.

        Args:
            filename_or_checkpoint: after ``--c`` nnU-Net names the file whose name it likes best; then the one that got
                furthest and can be read is taken instead.

        Raises:
            ResumeError: none can be read.
            WeightsError: a file that is named cannot be read.
        """
        if isinstance(filename_or_checkpoint, dict):
            self._load(filename_or_checkpoint)
        elif self._is_told_to_continue and not self._is_loaded:
            self._continue(warn_only=True)
        else:
            self._load(read_training(filename_or_checkpoint))

    def _continue_or_begin(self) -> None:
        if wants_restart(self.print_to_log_file):
            if self.local_rank == 0:
                move_aside(self.folder, self.print_to_log_file)
            if self.is_ddp:
                dist.barrier()
        else:
            self._continue(warn_only=self._is_told_to_continue)

    def _continue(self, *, warn_only: bool) -> None:
        content = newest(self.folder, self.print_to_log_file)
        if content is None:
            return
        now = {**self.my_init_kwargs, "schedule": self.facts().get("schedule")}
        check_same_training(content, now, self.folder, self.print_to_log_file if warn_only else None)
        self._load(content)
        known = [value for value in (self._best_ema, best_so_far(self.folder)) if value is not None]
        self._best_ema = max(known, default=None)

    def _load(self, content: dict[str, Any]) -> None:
        if not self.was_initialized:
            self.initialize()
        self.restore(content)
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
        self._is_loaded = True

    def restore(self, content: dict[str, Any]) -> None:
        """Weights, optimizer, place and log of a checkpoint, into a trainer that is initialised."""
        self.bare_network.load_state_dict(content["network_weights"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.current_epoch = content["current_epoch"]
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        ours = content.get("medmamba", {})
        self.seed = ours.get("seed", self.seed)
        self.iteration = ours.get("iteration", 0)
        own = [losses.numpy() for losses in ours.get("losses", [])][self.local_rank : self.local_rank + 1]
        self._losses = [np.array(loss) for losses in own for loss in losses]


def _next(waiting: list[dict[str, Any]], loader: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return waiting.pop(0) if waiting else next(loader)


def _plain(value: Any) -> Any:
    """Numbers of NumPy as numbers of Python, with the same value, also in lists."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _from_first(seed: int) -> int:
    box = [seed]
    dist.broadcast_object_list(box, src=0)
    return box[0]
