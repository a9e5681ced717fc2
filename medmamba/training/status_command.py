"""``medmamba status``: how the folds of a training stand."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import Command, CommandError, printable

if TYPE_CHECKING:
    from medmamba.training.checkpoints import Candidate
    from medmamba.training.status import FoldStatus


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "says how the folds of a training stand, also while they run, and those of stock nnU-Net trainers as well; the "
        "exit code is 0 where all is fine, 3 where a checkpoint is damaged or a fold can neither run on nor be resumed"
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="folder of a fold, of a model with its folds, or of a dataset, in nnUNet_results",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per fold and line")
    parser.add_argument(
        "--thorough", action="store_true", help="read every byte of the checkpoints to find damaged weights"
    )


def _run(arguments: argparse.Namespace) -> int:
    from medmamba.training.status import fold_status, runs_in

    folders = runs_in(arguments.run)
    if not folders:
        raise CommandError(
            f"{arguments.run} holds no training; give a folder fold_N of nnUNet_results, or one that holds such folders"
        )
    is_fine = True
    for folder in folders:
        try:
            status = fold_status(folder, thorough=arguments.thorough)
        except OSError as error:
            raise CommandError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
        is_fine &= status.is_fine
        if arguments.json:
            print(json.dumps(_as_json(status), allow_nan=False), flush=True)
        else:
            print("\n".join(printable(line) for line in _lines(status)), flush=True)
    return 0 if is_fine else 3


def _lines(status: FoldStatus) -> list[str]:
    return [
        "/".join(status.folder.resolve().parts[-3:]),
        f"  {_state(status)}",
        f"  {_reached(status)}",
        *_dice(status),
        *_times(status),
        f"  {_resume(status)}",
        *(f"  damaged: {one.problem}" for one in status.damaged),
        f"  disk: {_bytes(status.size_bytes)} used, {_bytes(status.free_bytes)} free",
    ]


def _state(status: FoldStatus) -> str:
    trainer = f"{status.trainer}: " if status.trainer else ""
    progress = status.progress
    if status.state == "finished":
        return f"{trainer}finished"
    if progress is None:
        return f"{trainer}not known whether it runs (there is no progress.json, which our trainers write)"
    said = {
        "training": "running" if status.is_running else "running, or killed: only its own machine knows",
        "killed": "not running: it was killed",
        "stopped": "not running: it was asked to stop",
    }[status.state]
    return f"{trainer}{said} (process {progress.pid} on {progress.host}, last sign of life {progress.saved_at})"


def _reached(status: FoldStatus) -> str:
    if status.epoch is None:
        return "no epoch is known to be complete"
    of = "" if status.epochs is None else f" of {status.epochs}"
    more = f", and {status.iteration} iterations of the next" if status.iteration else ""
    return f"{status.epoch}{of} epochs complete{more}"


def _dice(status: FoldStatus) -> list[str]:
    lines = []
    if status.best_dice is not None:
        when = "" if status.best_epoch is None else f", epoch {status.best_epoch}"
        lines.append(f"  best EMA pseudo Dice {status.best_dice:.4f}{when} (random patches, moving average)")
    if status.validation_dice is not None:
        lines.append(f"  final validation Dice {status.validation_dice:.4f} (whole images)")
    return lines


def _times(status: FoldStatus) -> list[str]:
    from medmamba.training.live import duration

    if status.seconds_per_epoch is None:
        return []
    left = "" if status.eta_s is None else f", {duration(status.eta_s)} of training left"
    return [f"  {duration(status.seconds_per_epoch)} per epoch{left}"]


def _resume(status: FoldStatus) -> str:
    if status.resume is not None:
        inside = f", iteration {status.resume.iteration}" if status.resume.iteration else ""
        return f"resumable from {status.resume.path.name} at epoch {status.resume.epoch}{inside}"
    if status.state == "finished":
        return "nothing is left to resume"
    return "not resumable: there is no checkpoint that can be gone on with"


def _bytes(size: float) -> str:
    power = min(int(math.log10(size) // 3), 4) if size >= 1 else 0
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _as_json(status: FoldStatus) -> dict[str, Any]:
    progress = status.progress
    return {
        "run": str(status.folder),
        "trainer": status.trainer,
        "state": status.state,
        "running": status.is_running,
        "host": None if progress is None else progress.host,
        "pid": None if progress is None else progress.pid,
        "saved_at": None if progress is None else progress.saved_at,
        "epoch": status.epoch,
        "iteration": status.iteration,
        "epochs": status.epochs,
        "best_ema_pseudo_dice": status.best_dice,
        "best_epoch": status.best_epoch,
        "final_validation_dice": status.validation_dice,
        "seconds_per_epoch": status.seconds_per_epoch,
        "eta_s": status.eta_s,
        "resume": None if status.resume is None else _candidate(status.resume),
        "damaged": [{"file": one.path.name, "problem": one.problem} for one in status.damaged],
        "bytes": status.size_bytes,
        "free_bytes": status.free_bytes,
        "is_fine": status.is_fine,
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    return {"file": one.path.name, "epoch": one.epoch, "iteration": one.iteration}


STATUS = Command(
    help="how a training stands: epochs, Dice, time left, what it would resume from, damage, disk",
    configure=_configure,
    run=_run,
)
