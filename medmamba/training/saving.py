"""Checkpoints that are complete under their name, and the one before as a reserve."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from medmamba.files import write_atomically

#: What torch.save says, in words of its own and without the number of the error, when the disk takes no more.
_ABOUT_WRITING = ("PytorchStreamWriter", "unexpected pos")


def save(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """``torch.save`` under ``path``, which keeps what it held until the new file is on the disk and its end was read.

    Args:
        content: with tensors, numbers, texts and containers of them, for ``torch.load(path, weights_only=True)``.

    Raises:
        OSError: the disk is full, or the folder missing or not writable.
    """

    def write(temporary: str) -> None:
        with disk_errors(path):
            torch.save(content, temporary)

    write_atomically(path, write, check=_check_end)


def save_in_ring(path: str | os.PathLike[str], previous: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """:func:`save`, with what ``path`` held kept as ``previous``; at every moment ``path`` or ``previous`` is complete.

    Raises:
        OSError: as :func:`save`; ``path`` and ``previous`` are as they were.
    """
    path, previous = Path(path), Path(previous)
    recover(path, previous)
    waiting = _waiting(previous)
    waiting.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        _link(path, waiting)
    try:
        save(path, content)
    except BaseException:
        if path.exists():
            waiting.unlink(missing_ok=True)
        elif waiting.exists():
            waiting.replace(path)
        raise
    if waiting.exists():
        waiting.replace(previous)


def recover(path: str | os.PathLike[str], previous: str | os.PathLike[str]) -> None:
    """Give ``path`` its content back where a kill came while it had no name, on file systems without second names.

    Raises:
        OSError: the folder is not writable.
    """
    path, waiting = Path(path), _waiting(Path(previous))
    if not path.exists() and waiting.exists():
        waiting.replace(path)


def _waiting(previous: Path) -> Path:
    """What will be ``previous`` once its successor is complete."""
    return previous.with_name(f".{previous.name}.next.tmp")


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """What torch and safetensors say of a disk that takes no more becomes an OSError of that file.

    Raises:
        OSError: with the number ENOSPC.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _ABOUT_WRITING):
            raise
        raise OSError(errno.ENOSPC, str(error).partition("\n")[0], str(path)) from error


def _link(path: Path, other: Path) -> None:
    """A second name for a file; on file systems that know none, a move."""
    try:
        os.link(path, other)
    except FileNotFoundError:
        raise
    except OSError:
        path.replace(other)


def _check_end(path: str) -> None:
    """The list of contents lies at the end of the file: where it can be read, nothing was cut off.

    Raises:
        OSError: it cannot.
    """
    try:
        with zipfile.ZipFile(path):
            pass
    except zipfile.BadZipFile as error:
        raise OSError(errno.EIO, f"what was written cannot be read back ({error})", path) from error
