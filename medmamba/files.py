"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call ``write`` with a temporary path in the same folder, then move the result to ``path``.

    An existing ``path`` stays as it is until the new content is complete and on disk; when ``write`` raises,
    nothing is left behind.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        Path(temporary).chmod(0o666 & ~_umask())
        write(temporary)
        with Path(temporary).open("rb") as stream:
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON, atomically; key order is kept, as in nnU-Net's own plans files.

    Raises:
        TypeError: a value cannot be written as JSON.
        OSError: the folder is missing, full or not writable.
    """
    text = json.dumps(content, indent=4) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
