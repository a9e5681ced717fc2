"""What a training that starts in a folder with checkpoints does: continue, begin anew, or refuse."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medmamba.files import temporaries_in
from medmamba.nnunet.errors import UserFacingError
from medmamba.training.checkpoints import BEST, LATEST, NAMES, PREVIOUS, Candidate, candidate, candidates
from medmamba.training.progress import is_running, read_progress
from medmamba.training.saving import recover
from medmamba.training.settings import RESTART
from medmamba.weights import WeightsError, read_training

_DIFFERENCES_SHOWN = 5

Log = Callable[[str], None]


class ResumeError(UserFacingError, RuntimeError):
    """A folder holds a training that cannot be continued; the text says why and what to do."""


def move_aside(folder: Path, log: Log) -> None:
    """Move checkpoints and event files of an earlier training into a folder of their own; nothing is deleted.

    Raises:
        OSError: the folder is not writable.
    """
    there = [path for name in (*NAMES, "tensorboard", "progress.json") if (path := folder / name).exists()]
    if not there:
        return
    target = folder / datetime.now(UTC).strftime("replaced_%Y%m%d_%H%M%S_%f")
    target.mkdir()
    for path in there:
        path.rename(target / path.name)
    log(f"Beginning anew; what was there ({', '.join(path.name for path in there)}) is in {target}.")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left of files that they were writing, unless one still trains here.

    Raises:
        OSError: the folder is not writable.
    """
    progress = read_progress(folder)
    if progress is not None and progress.pid != os.getpid() and is_running(progress):
        return
    recover(folder / LATEST, folder / PREVIOUS)
    for path in temporaries_in(folder):
        path.unlink(missing_ok=True)


def newest(folder: Path, log: Log) -> dict[str, Any] | None:
    """Content of the checkpoint that got furthest and can be read, or None where there is none.

    One that cannot be read is said, and gets the ending ``.damaged``, so that nothing is written over it.

    Raises:
        ResumeError: there are checkpoints, and none can be read.
        OSError: the folder is not writable.
    """
    found = candidates(folder)
    for one in found:
        if one.problem is not None:
            _set_aside(one, log)
    for one in found:
        checked = one if one.problem else candidate(one.path, thorough=True)
        if checked.problem is None:
            log(f"Continuing from {one.path.name}: epoch {one.epoch}, iteration {one.iteration}.")
            return read_training(one.path)
        if one.problem is None:
            _set_aside(checked, log)
    if found:
        raise ResumeError(
            f"no checkpoint in {folder} can be read; they are kept as *.damaged; give the same command again to begin "
            "at epoch 0"
        )
    return None


def _set_aside(damaged: Candidate, log: Log) -> None:
    kept = damaged.path.with_name(f"{damaged.path.name}.damaged")
    log(f"WARNING: {damaged.problem}. It is kept as {kept.name}.")
    if damaged.path.exists():  # with several processes another one may have been faster
        damaged.path.replace(kept)


def best_so_far(folder: Path) -> float | None:
    """The exponential mean of the pseudo Dice of ``checkpoint_best.pth``, or None without one that can be read."""
    if not (folder / BEST).is_file():
        return None
    try:
        value = read_training(folder / BEST, in_place=True).get("_best_ema")
    except WeightsError:
        return None
    return float(value) if isinstance(value, int | float) else None


def check_same_training(content: Mapping[str, Any], now: Mapping[str, Any], folder: Path, log: Log | None) -> None:
    """Compare a checkpoint's training with the one that is about to continue it.

    Args:
        content: of the checkpoint.
        now: ``init_args`` of this training, and ``schedule`` where it has one.
        log: where to warn instead of refusing, after an explicit ``--c``.

    Raises:
        ResumeError: plans, configuration, labels or schedule differ.
    """
    was = {**content.get("init_args", {}), "schedule": content.get("medmamba", {}).get("schedule")}
    changed: list[str] = []
    for key, inner in (("configuration", None), ("plans", None), ("dataset_json", "labels"), ("schedule", None)):
        one, other = (_at(_at(values, key), inner) for values in (was, now))
        changed += _differences(key, one, other)
    if not changed:
        return
    shown = "; ".join(changed[:_DIFFERENCES_SHOWN]) + ("; ..." if len(changed) > _DIFFERENCES_SHOWN else "")
    if log is not None:
        log(f"WARNING: --c continues a training that was begun otherwise: {shown}.")
        return
    raise ResumeError(
        f"{folder} holds a training that was begun otherwise ({shown}). To continue it all the same add --c; to begin "
        f"anew, with its checkpoints moved into a folder beside, use `medmamba train ... --restart` or "
        f"{RESTART}=1; to keep both use other plans (--plans-name)"
    )


def _at(values: Any, key: str | None) -> Any:
    return values if key is None else (values or {}).get(key)


def _differences(name: str, was: Any, now: Any) -> list[str]:
    """Places where two trees of plain values differ; what only one of them says is a difference."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys((*was, *now))
        return [text for key in keys for text in _differences(f"{name}.{key}", was.get(key), now.get(key))]
    same = list(was) == list(now) if isinstance(was, list | tuple) and isinstance(now, list | tuple) else was == now
    return [] if same else [f"{name} {_short(was)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
