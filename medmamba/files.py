"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
_TEMPORARY_NAME = re.compile(rf"\.(?P<name>.+)\.[^.]+{re.escape(_TEMPORARY)}")


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[str], object], check: Callable[[str], object] | None = None
) -> None:
    """Call ``write`` with a temporary path in the same folder, then move the result to ``path``.

    An existing ``path`` stays as it is until the new content is complete and on disk; when ``write`` or ``check``
    raises, nothing is left behind. A killed process can leave its temporary file (:func:`temporaries_in` finds it).

    Args:
        check: called with the temporary path once its content is on disk; raises what speaks against the move.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
    os.close(handle)
    try:
        Path(temporary).chmod(0o666 & ~_umask())
        write(temporary)
        with Path(temporary).open("rb") as stream:
            os.fsync(stream.fileno())
        if check is not None:
            check(temporary)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def temporaries_in(folder: str | os.PathLike[str]) -> dict[Path, str]:
    """What killed processes left of :func:`write_atomically` in a folder, or living ones are just writing there.

    Returns:
        Temporary paths and the names that they were for.

    Raises:
        OSError: the folder cannot be read.
    """
    found = {path: _TEMPORARY_NAME.fullmatch(path.name) for path in sorted(Path(folder).iterdir())}
    return {path: match["name"] for path, match in found.items() if match is not None}


def append_line(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Append one line of JSON and wait until it is on the disk.

    Raises:
        TypeError: a value cannot be written as JSON.
        ValueError: a number is NaN or infinite, which JSON has no word for.
        OSError: the disk is full, or the file cannot be written.
    """
    try:
        line = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # a file name that is no UTF-8: JSON can only escape it
        line = json.dumps(content, allow_nan=False).encode()
    with Path(path).open("ab") as stream:
        stream.write(line + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file against other processes until it is closed.

    Args:
        handle: number of the open file.
        shared: several may hold it, as long as all of them say so.

    Returns:
        False where another process holds it. True without any lock on Windows, and, with a warning in the log, on
        network file systems that know none.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        _log.warning("no lock on this file system (%s): see that no second process writes there", error.strerror)
    return True


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON, atomically; key order is kept, as in nnU-Net's own plans files.

    Raises:
        TypeError: a value cannot be written as JSON.
        OSError: the folder is missing, full or not writable.
    """
    text = json.dumps(content, indent=4) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _sync_folder(folder: Path) -> None:
    """Bring a new name in a folder to the disk, where the system can: without it a power cut may take the name back."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
