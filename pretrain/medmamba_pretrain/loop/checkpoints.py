"""Checkpoints of a run: the last two, each complete or not there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medmamba.command import CommandError
from medmamba.training.saving import disk_errors, save

_log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint_(\d{9})\.pt")
_KEPT = 2


class Checkpoints:
    """Checkpoints in a folder.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write atomically, then remove all but the last two.

        Raises:
            CommandError: the disk is full or not writable; what was there before is still there. Exit code 75: the
                run can go on.
        """
        path = self._folder / f"checkpoint_{step:09d}.pt"
        with or_stop(path):
            save(path, {"step": step, **state})
        for old in self._steps()[:-_KEPT]:
            (self._folder / f"checkpoint_{old:09d}.pt").unlink(missing_ok=True)

    def latest(self) -> dict[str, Any] | None:
        """The newest one that can be read, on the CPU, or None; broken ones are renamed to ``.broken``, with a warning.

        Raises:
            CommandError: there are checkpoints, and none can be read.
        """
        steps = self._steps()
        for step in reversed(steps):
            path = self._folder / f"checkpoint_{step:09d}.pt"
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                if content["step"] == step:
                    return content
                reason = f"it holds step {content['step']}"
            except Exception as error:  # damaged bytes may be read as any command of a pickle
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
            _log.warning("%s cannot be read (%s); going back to the one before", path, reason)
            path.replace(path.with_suffix(".broken"))
        if steps:
            raise CommandError(
                f"no checkpoint in {self._folder} can be read; they are kept as *.broken; the same command begins "
                "again at step 0"
            )
        return None

    def _steps(self) -> list[int]:
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)


@contextmanager
def or_stop(path: Path) -> Iterator[None]:
    """A disk that takes no more becomes one line and exit code 75: the run can go on.

    Raises:
        CommandError: the file cannot be written.
    """
    try:
        with disk_errors(path):
            yield
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]  # safetensors gives no number of the error
        raise CommandError(
            f"{path} cannot be written ({reason}); make room and give the same command again to continue",
            exit_code=75,
        ) from error
