"""What decides about a training from outside: environment variables, because nnU-Net's command has no place for it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from medmamba.command import CommandError

#: Begins a training anew where another one was.
RESTART = "MEDMAMBA_RESTART"
#: A whole number that makes a training repeatable.
SEED = "MEDMAMBA_SEED"
#: Minutes between two checkpoints within an epoch.
SAVE_MINUTES = "MEDMAMBA_SAVE_MINUTES"
#: 0 leaves the rehearsal before epoch 0 out.
REHEARSAL = "MEDMAMBA_REHEARSAL"
#: Where the trained folder of a teacher is, in place of where the plans say.
TEACHER = "MEDMAMBA_TEACHER"

_DEFAULT_MINUTES = 15.0
#: Of SLURM: how often a job was requeued.
_REQUEUED = "SLURM_RESTART_COUNT"


def seed_of_new_training() -> int:
    """``MEDMAMBA_SEED``, or a random one.

    Raises:
        CommandError: it is no whole number of 0 or more.
    """
    text = _text(SEED)
    return seed_from(SEED, text) if text else secrets.randbits(63)


def minutes_between_saves() -> float:
    """``MEDMAMBA_SAVE_MINUTES``, or 15.

    Raises:
        CommandError: it is no number of 0 or more.
    """
    text = _text(SAVE_MINUTES)
    return minutes_from(SAVE_MINUTES, text) if text else _DEFAULT_MINUTES


def wants_rehearsal() -> bool:
    """Whether trainings begin with a rehearsal."""
    return _text(REHEARSAL).lower() not in ("0", "false", "no")


def teacher_folder() -> Path | None:
    """``MEDMAMBA_TEACHER``, or None."""
    text = _text(TEACHER)
    return Path(text) if text else None


def wants_restart(log: Callable[[str], None]) -> bool:
    """Whether the user asks to begin anew; a job that SLURM has requeued continues what its first life began."""
    if _text(RESTART).lower() not in ("1", "true", "yes"):
        return False
    if _text(_REQUEUED) not in ("", "0"):
        log(f"{RESTART} is ignored: this job was requeued, it continues.")
        return False
    return True


def seed_from(name: str, text: str) -> int:
    """A seed as somebody wrote it for the variable or option ``name``.

    Raises:
        CommandError: it is no whole number of 0 or more.
    """
    if not text.isdecimal():
        raise CommandError(f"{name}={text!r} is no whole number of 0 or more")
    return int(text)


def minutes_from(name: str, text: str) -> float:
    """Minutes as somebody wrote them for the variable or option ``name``.

    Raises:
        CommandError: it is no number of 0 or more.
    """
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not minutes >= 0:
        raise CommandError(f"{name}={text!r} is no number of minutes, 0 or more")
    return minutes


def _text(name: str) -> str:
    return os.environ.get(name, "").strip()
