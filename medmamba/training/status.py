"""How the folds of a training stand, read from their folders: also while it runs, also those of stock trainers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.training.checkpoints import FINAL, NAMES, Candidate, candidates
from medmamba.training.progress import NAME as PROGRESS
from medmamba.training.progress import Progress, best_of, is_finite, is_running, read_progress, seconds_per_epoch
from medmamba.weights import WeightsError, read_training

_FOLD = re.compile(r"fold_(\d+|all)")


@dataclass(frozen=True)
class FoldStatus:
    """How one fold stands.

    Attributes:
        folder: of the fold.
        trainer: name of its class; None where no checkpoint says it.
        state: "finished"; "training", "stopped" or "killed" where ``progress.json`` says so; else "unknown".
        is_running: whether its process lives; None where only its own machine, or nobody, knows.
        progress: of ``progress.json``.
        epoch: epochs that are complete, and the number, counted from 0, of the next; None where nothing says it.
        iteration: of the next epoch that are done.
        epochs: of the whole training; None where nothing says it.
        best_dice: highest exponential moving average of nnU-Net's pseudo Dice, on random patches of the validation
            cases.
        best_epoch: the epoch of that value, counted from 0.
        seconds_per_epoch: of late.
        eta_s: seconds of training that are left.
        resume: the checkpoint to go on with; None where the training is finished or there is none.
        damaged: checkpoints that cannot be gone on with.
        size_bytes: of everything in the folder.
        free_bytes: on its disk.
        validation_dice: mean foreground Dice of the final validation, on whole images.
    """

    folder: Path
    trainer: str | None
    state: str
    is_running: bool | None
    progress: Progress | None
    epoch: int | None
    iteration: int
    epochs: int | None
    best_dice: float | None
    best_epoch: int | None
    seconds_per_epoch: float | None
    eta_s: float | None
    resume: Candidate | None
    damaged: tuple[Candidate, ...]
    size_bytes: int
    free_bytes: int
    validation_dice: float | None

    @property
    def is_fine(self) -> bool:
        """No checkpoint is damaged, and it is finished, runs, or can be gone on with."""
        return not self.damaged and (self.state == "finished" or self.is_running is True or self.resume is not None)


def runs_in(folder: Path) -> list[Path]:
    """Folders of folds: the folder itself, or those in a model's folder, or those of all models of a dataset."""
    if _is_run(folder):
        return [folder]
    for pattern in ("fold_*", "*/fold_*"):
        found = sorted(path for path in folder.glob(pattern) if path.is_dir() and _FOLD.fullmatch(path.name))
        if found:
            return found
    return []


def fold_status(folder: Path, *, thorough: bool = False) -> FoldStatus:
    """How one fold stands.

    Args:
        folder: of the fold.
        thorough: read every byte of the checkpoints for damage, see :func:`medmamba.training.checkpoints.candidates`.

    Raises:
        OSError: the folder cannot be read.
    """
    found = candidates(folder, thorough=thorough)
    good = [one for one in found if one.problem is None]
    newest = good[0] if good else None
    content = _content(newest)
    progress = read_progress(folder)
    reached = _reached(newest, progress)
    is_newer = progress is not None and (newest is None or (progress.epoch, progress.iteration) >= newest.position)
    latest = progress if is_newer else None
    is_finished = newest is not None and newest.path.name == FINAL
    runs = False if is_finished else None if progress is None else is_running(progress)
    best_dice, best_epoch = _best(content, latest)
    seconds = _seconds_per_epoch(content, latest)
    epochs = _epochs(content, progress, folder) or (reached[0] if is_finished and reached else None)
    iterations = _iterations(content, progress)
    return FoldStatus(
        folder=folder,
        trainer=_trainer(content),
        state=_state(progress, is_finished=is_finished, runs=runs),
        is_running=runs,
        progress=progress,
        epoch=None if reached is None else reached[0],
        iteration=0 if reached is None else reached[1],
        epochs=epochs,
        best_dice=best_dice,
        best_epoch=best_epoch,
        seconds_per_epoch=seconds,
        eta_s=None if is_finished else _eta_s(reached, epochs, iterations, seconds),
        resume=None if is_finished else newest,
        damaged=tuple(one for one in found if one.problem is not None),
        size_bytes=_size_bytes(folder),
        free_bytes=shutil.disk_usage(folder).free,
        validation_dice=_validation_dice(folder),
    )


def _is_run(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = (*NAMES, PROGRESS)
    return bool(_FOLD.fullmatch(folder.resolve().name)) or any((folder / name).is_file() for name in names)


def _content(newest: Candidate | None) -> dict[str, Any]:
    """What lies beside the weights of the newest checkpoint; nothing where it was replaced in this moment."""
    try:
        return {} if newest is None else read_training(newest.path, in_place=True)
    except WeightsError:
        return {}


def _reached(newest: Candidate | None, progress: Progress | None) -> tuple[int, int] | None:
    positions = [] if newest is None else [newest.position]
    if progress is not None:
        positions.append((progress.epoch, progress.iteration))
    return max(positions, default=None)


def _state(progress: Progress | None, *, is_finished: bool, runs: bool | None) -> str:
    if is_finished:
        return "finished"
    if progress is None:
        return "unknown"
    return "killed" if progress.state == "training" and runs is False else progress.state


def _best(content: Mapping[str, Any], latest: Progress | None) -> tuple[float | None, int | None]:
    found = [best_of(_log(content, "ema_fg_dice"))]
    if latest is not None and is_finite(latest.best_dice):
        found.append((latest.best_dice, latest.best_epoch))
    best = max((value for value, _ in found if value is not None), default=None)
    # Of equal values the one whose epoch is known, and of these the first: it made checkpoint_best.
    epochs = [epoch for value, epoch in found if value == best and epoch is not None]
    return best, min(epochs, default=None)


def _seconds_per_epoch(content: Mapping[str, Any], latest: Progress | None) -> float | None:
    if latest is not None and latest.seconds_per_epoch is not None:
        return latest.seconds_per_epoch
    return seconds_per_epoch(_log(content, "epoch_start_timestamps"), _log(content, "epoch_end_timestamps"))


def _eta_s(
    reached: tuple[int, int] | None, epochs: int | None, iterations: int | None, seconds: float | None
) -> float | None:
    if reached is None or epochs is None or seconds is None:
        return None
    done = reached[0] + (reached[1] / iterations if iterations else 0)
    return max(epochs - done, 0) * seconds


def _epochs(content: Mapping[str, Any], progress: Progress | None, folder: Path) -> int | None:
    if progress is not None:
        return progress.epochs
    number = _mapping(_mapping(content, "medmamba"), "schedule").get("num_epochs")
    if isinstance(number, int):
        return number
    try:  # nnU-Net notes the attributes of its trainer as text, at the start
        return int(_mapping({"debug": _json(folder / "debug.json")}, "debug")["num_epochs"])
    except (KeyError, TypeError, ValueError):
        return None


def _iterations(content: Mapping[str, Any], progress: Progress | None) -> int | None:
    if progress is not None and progress.iterations is not None:
        return progress.iterations
    number = _mapping(_mapping(content, "medmamba"), "schedule").get("num_iterations_per_epoch")
    return number if isinstance(number, int) else None


def _trainer(content: Mapping[str, Any]) -> str | None:
    # Ours write nnU-Net's trainer under its name, so that stock nnU-Net predicts with them.
    name = _mapping(content, "medmamba").get("trainer", content.get("trainer_name"))
    return name if isinstance(name, str) else None


def _validation_dice(folder: Path) -> float | None:
    summary = {"summary": _json(folder / "validation" / "summary.json")}
    dice = _mapping(_mapping(summary, "summary"), "foreground_mean").get("Dice")
    return float(dice) if is_finite(dice) else None


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:  # a running training replaces files
            continue
    return total


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _log(content: Mapping[str, Any], key: str) -> list[Any]:
    values = _mapping(content, "logging").get(key)
    return values if isinstance(values, list) else []


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}
