"""The one folder of the demo: what is the demo's own in it, and what is not.

A marker file lists every path that a run is about to create. A later run removes exactly those and leaves every other
file alone; a folder without the marker is used only when it is empty or new.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from medmamba.command import CommandError
from medmamba.files import write_json

MARKER = "medmamba-demo.json"


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not ours to write into. Changes nothing.

    Args:
        folder: new, empty, or left by an earlier run.

    Raises:
        CommandError: not a folder, or a folder with content and without our marker.
    """
    if folder.is_symlink() and not folder.exists():
        raise CommandError(f"{folder} is a link to nothing; choose another --out")
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file; choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise CommandError(f"{folder} is not empty and was not made by medmamba demo; choose another --out")
    _read_marker(folder)


def claim_folder(folder: Path, paths: Sequence[str]) -> None:
    """Remove what an earlier run made, then note what this run will make.

    Args:
        folder: a folder that passes :func:`check_folder`; created when it is missing.
        paths: files and folders of this run, relative to ``folder``, with ``/``.

    Raises:
        CommandError: as :func:`check_folder`; or a path of this run is taken by something that is not ours; or the
            folder cannot be written.
    """
    check_folder(folder)
    earlier = _read_marker(folder)
    for path in sorted({*earlier, *paths}):
        if link := next((p for p in (folder / path).parents if folder in p.parents and p.is_symlink()), None):
            raise CommandError(f"{link} leads through a link, where the demo does not write; choose another --out")
    for path in sorted(set(paths) - set(earlier)):
        if (folder / path).exists():
            raise CommandError(f"{folder / path} was not made by medmamba demo; move it away or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Before anything is removed or made, so that a run that is killed leaves nothing we would not know again.
        _write_marker(folder, sorted({*earlier, *paths}))
        for path in earlier:
            _remove(folder, path)
        _write_marker(folder, sorted(paths))
    except OSError as error:
        raise CommandError(f"cannot write in {folder} ({error.strerror}); choose another --out") from error


def _write_marker(folder: Path, paths: Sequence[str]) -> None:
    note = "medmamba demo made the paths listed here, removes them when it runs again, and touches no other file"
    write_json(folder / MARKER, {"note": note, "paths": list(paths)})


def _read_marker(folder: Path) -> list[str]:
    marker = folder / MARKER
    if not marker.is_file():
        return []
    try:
        paths = json.loads(marker.read_text(encoding="utf-8"))["paths"]
        is_good = all(_is_inside(path) for path in paths)
    except (ValueError, KeyError, TypeError, OSError):
        is_good = False
    if not is_good:
        raise CommandError(f"{marker} is damaged; choose another --out or remove the folder")
    return list(paths)


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and not path.startswith("/") and parts[0] != MARKER


def _remove(folder: Path, path: str) -> None:
    """Remove one path of ours and then its parents inside ``folder``, as far up as they are empty."""
    target = folder / path
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    for parent in target.parents:
        if parent == folder or not parent.is_dir() or any(parent.iterdir()):
            return
        parent.rmdir()
