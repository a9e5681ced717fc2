"""From an exception to what a report says: stage, cause, remedy."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medmamba.inference.reading import ImageRefused
from medmamba.inference.writing import WriteFailed

from .messages import MESSAGES

_WRITE_IDS = {message.code: identifier for identifier, message in MESSAGES.items() if identifier > "MM-RN-004"}
_FRAMES = 6


def problem_of(error: Exception, stage: str, folders: Iterable[Path]) -> tuple[str, dict[str, Any]]:
    """Status and description of a case that ended with ``error``.

    Args:
        stage: "reading", "predicting" or "writing".
        folders: paths that must not stand in the text.

    Returns:
        "refused" (the input is at fault) or "failed", and the fields stage, id, code, cause, remedy; those of an
        unexpected error also hold where in the code it arose.
    """
    if isinstance(error, ImageRefused):
        cause, remedy = _split(error.text)
        return "refused", _described(stage, error.id or "", error.code, cause, remedy)
    if isinstance(error, OSError) and stage == "reading" and error.errno != errno.ENOMEM:
        return "refused", _described(stage, "MM-IO-001", "not-opened", _text(error, folders), "check path and rights")
    if isinstance(error, WriteFailed):
        cause, remedy = _split(error.text)
        identifier = _WRITE_IDS[error.code]
        return "failed", _described(stage, identifier, error.code, cause, remedy or MESSAGES[identifier].remedy)
    identifier = _identifier(error)
    message = MESSAGES[identifier]
    problem = _described(stage, identifier, message.code, _text(error, folders), message.remedy)
    return "failed", problem | {"frames": _frames(error)}


def _identifier(error: Exception) -> str:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "MM-RN-001"
    text = str(error).lower()
    # torch says so in a RuntimeError, of the GPU's allocator or of the CPU's, and so does SimpleITK.
    if isinstance(error, RuntimeError) and "out of memory" in text:
        return "MM-RN-002"
    if isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text):
        return "MM-RN-001"
    return "MM-RN-003"


def _described(stage: str, identifier: str, code: str, cause: str, remedy: str) -> dict[str, Any]:
    return {"stage": stage, "id": identifier, "code": code, "cause": cause, "remedy": remedy}


def _split(text: str) -> tuple[str, str]:
    """Cause and remedy of a sentence of ours, which separates them with a semicolon."""
    cause, separator, remedy = text.rpartition("; ")
    return (cause, remedy) if separator else (text, "")


def _text(error: Exception, folders: Iterable[Path]) -> str:
    """First line of a foreign error, without paths that tell about the machine."""
    text = (error.strerror or "") if isinstance(error, OSError) else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    for folder in sorted({str(folder.resolve()) for folder in folders}, key=len, reverse=True):
        if folder != os.sep:
            line = line.replace(f"{folder}{os.sep}", "").replace(folder, ".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _frames(error: BaseException) -> list[str]:
    """The last functions before the error, by module: a path would hold the name of a user."""
    frames = [
        f"{frame.f_globals.get('__name__', '?')}:{line} {frame.f_code.co_name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return frames[-_FRAMES:]


def note(identifier: str, text: str) -> Mapping[str, str]:
    """A note of the runner as the report holds it."""
    if identifier not in MESSAGES:
        raise KeyError(identifier)
    return {"id": identifier, "text": text}
