"""The checkpoints of a run: which are there, how far each got, and which of them can be gone on with."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.weights import WeightsError, read_training

FINAL, LATEST, PREVIOUS, BEST = (f"checkpoint_{name}.pth" for name in ("final", "latest", "previous", "best"))
#: Names of a run's checkpoints; of two that got equally far the first is taken.
NAMES = (FINAL, LATEST, PREVIOUS, BEST)
#: Position of a checkpoint that cannot be read.
UNKNOWN = -1


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that a run could go on with.

    Attributes:
        path: of the file.
        epoch: to go on with (nnU-Net's ``current_epoch``: that many are complete), or ``UNKNOWN``.
        iteration: of that epoch to go on with; 0 when none of it is done (always so with stock trainers).
        problem: why it cannot be gone on with, in one line; None when it can.
    """

    path: Path
    epoch: int
    iteration: int
    problem: str | None

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, iteration): grows during a training."""
        return self.epoch, self.iteration


def candidates(folder: Path, *, thorough: bool = False) -> list[Candidate]:
    """The checkpoints of a run, newest first; those that cannot be read come last.

    Newest is who got furthest, whatever the file's name or time. No pickled code is run, and the weights stay in the
    files.

    Args:
        folder: of one fold.
        thorough: compare the checksums of all data as well, which reads every byte; else damage is seen only where it
            made a file shorter or hit its description of itself.
    """
    found = [candidate(folder / name, thorough=thorough) for name in NAMES if (folder / name).is_file()]
    return sorted(found, key=lambda one: one.position, reverse=True)  # stable: equals stay in the order of NAMES


def candidate(path: Path, *, thorough: bool = False) -> Candidate:
    """How far one checkpoint got and whether it can be gone on with; arguments as of :func:`candidates`."""
    try:
        content = read_training(path, in_place=True)
        if thorough:
            _compare_checksums(path)
    except WeightsError as error:
        return Candidate(path, UNKNOWN, UNKNOWN, str(error))
    return Candidate(path, *_position(content), _problem(path, content))


def _position(content: dict[str, Any]) -> tuple[int, int]:
    epoch, ours = content.get("current_epoch"), content.get("medmamba")
    iteration = ours.get("iteration", 0) if isinstance(ours, dict) else 0
    return (epoch, iteration) if isinstance(epoch, int) and isinstance(iteration, int) else (UNKNOWN, UNKNOWN)


def _problem(path: Path, content: dict[str, Any]) -> str | None:
    if _position(content)[0] == UNKNOWN:
        return f"{path} does not say how far it got (current_epoch); it is no checkpoint of nnU-Net"
    if not isinstance(content.get("optimizer_state"), dict) or not isinstance(content.get("logging"), dict):
        return f"{path} holds weights without the state of their training; only prediction can use it"
    return None


def _compare_checksums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{path} is damaged ({error})") from error
    if damaged is not None:
        raise WeightsError(f"{path} is damaged: the checksum of its part {damaged} does not match")
