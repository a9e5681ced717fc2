"""``progress.json``: how far a run is, for people and programs that look on from outside."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeGuard

from medmamba.files import write_json

_log = logging.getLogger(__name__)

NAME = "progress.json"
#: Epochs whose median is the time per epoch.
_LATEST = 10
State = Literal["training", "stopped", "finished"]
#: Seconds by which the clock of the system and that of its processes may differ.
_CLOCK_SLACK_S = 5.0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        epoch: epochs that are complete; the number, counted from 0, of the one to go on with.
        iteration: iterations of that epoch that are done.
        epochs: of the whole training.
        state: "training" while its process lives (see :func:`is_running`), "stopped" when it was asked to stop,
            "finished" when the last epoch is complete.
        best_dice: highest exponential moving average of nnU-Net's pseudo Dice so far, which decides
            ``checkpoint_best.pth``; None before the first epoch is complete.
        best_epoch: the epoch of that value, counted from 0.
        seconds_per_epoch: as long as the latest epochs took; None before the first is complete.
        iterations: per epoch.
        seed: of the run; None where it has none.
        saved_at: when this was written, ISO 8601 in UTC.
        host: name of the machine that trains.
        pid: of the process that trains.
    """

    epoch: int
    iteration: int
    epochs: int
    state: State
    best_dice: float | None = None
    best_epoch: int | None = None
    seconds_per_epoch: float | None = None
    iterations: int | None = None
    seed: int | None = None
    saved_at: str = field(default_factory=_now)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    @property
    def saved_time(self) -> datetime:
        """``saved_at`` with its time zone."""
        return datetime.fromisoformat(self.saved_at)


_NUMBER = (int, float)
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "best_dice": (*_NUMBER, NoneType),
    "best_epoch": (int, NoneType),
    "seconds_per_epoch": (*_NUMBER, NoneType),
    "iterations": (int, NoneType),
    "seed": (int, NoneType),
}
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("epoch", "iteration", "epochs", "pid"), (int,)),
    **dict.fromkeys(("state", "saved_at", "host"), (str,)),
    **_OPTIONAL,
}


def best_of(averages: Sequence[object]) -> tuple[float | None, int | None]:
    """Highest finite value of a curve, and its epoch, the first of equals; None twice where there is none."""
    found = [(float(value), -epoch) for epoch, value in enumerate(averages) if is_finite(value)]
    value, epoch = max(found, default=(None, None))
    return value, None if epoch is None else -epoch


def seconds_per_epoch(starts: Sequence[object], ends: Sequence[object]) -> float | None:
    """Median of the latest epochs that are complete; None before the first."""
    seconds = [end - start for start, end in zip(starts, ends, strict=False) if is_finite(start) and is_finite(end)]
    return statistics.median(seconds[-_LATEST:]) if seconds else None


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number that a person can read something from."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_progress(folder: Path, progress: Progress) -> None:
    """Write ``progress.json`` into a fold's folder; a reader never sees half of it.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
    write_json(folder / NAME, asdict(progress))


def read_progress(folder: Path) -> Progress | None:
    """What ``progress.json`` says; None where there is none, or, with a warning in the log, a damaged one."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        _log.warning("%s is passed over: it is damaged (%s)", path, error)
        return None


def is_running(progress: Progress) -> bool | None:
    """Whether the process that wrote it still trains; None where another machine knows."""
    if progress.state != "training":
        return False
    if progress.host != socket.gethostname():
        return None
    if not _exists(progress.pid):
        return False
    state, started = _described(progress.pid)
    # A number is given to another process some time after its first one has ended.
    is_it = started is None or started <= progress.saved_time.timestamp() + _CLOCK_SLACK_S
    return is_it and state != "Z"


def _parsed(content: Any) -> Progress:
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} in place of an object")
    known = {one.name for one in fields(Progress)}
    values = {name: value for name, value in content.items() if name in known}
    for name, types in _TYPES.items():
        if name not in values and name in _OPTIONAL:
            continue
        if name not in values or not isinstance(values[name], types) or isinstance(values[name], bool):
            raise ValueError(f"{name} is {values.get(name, 'missing')!r}")
    if values["state"] not in ("training", "stopped", "finished"):
        raise ValueError(f"state is {values['state']!r}")
    progress = Progress(**values)
    if progress.saved_time.tzinfo is None:
        raise ValueError(f"saved_at is {progress.saved_at!r}, without a time zone")
    return progress


def _exists(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (OSError, OverflowError):
        return False
    return True


def _described(pid: int) -> tuple[str, float | None]:
    """Letter of its state ("Z": ended, but nobody has asked how), and when it began in seconds since 1970.

    Nothing and None where the system does not say.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        from_state_on = stat.rpartition(")")[2].split()  # field 3; the name in brackets before it may hold anything
        return from_state_on[0], int(boot.split()[1]) + int(from_state_on[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return "", None
