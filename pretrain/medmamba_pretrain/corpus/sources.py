"""Which files and folders of the inputs are images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medmamba.command import CommandError
from medmamba.inference.reading import READABLE_SUFFIXES

#: Images and archives that are not read, but must not be passed over in silence either.
UNREADABLE_SUFFIXES = (
    *(".mnc", ".gipl", ".gipl.gz", ".hdr", ".mgh", ".mgz", ".nii.bz2", ".nii.zst", ".par", ".vtk", ".vti", ".nhdr.gz"),
    *(".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar"),
)
_DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
_DICOM_MAGIC = (128, b"DICM")

Kind = Literal["file", "dicom", "unreadable"]


@dataclass(frozen=True)
class Source:
    """One image of the inputs.

    Attributes:
        key: label of the input folder and path in it, with "/"; the name in the manifest.
        path: where it is now.
        kind: "file", "dicom" (a folder with one series), or "unreadable" (a format or folder that is not read).
    """

    key: str
    path: Path
    kind: Kind

    @property
    def stamp(self) -> str:
        """Changes when size or time of the file, or of any file of the series, does."""
        try:
            if self.kind != "dicom":
                found = self.path.stat()
                return f"{found.st_size}-{found.st_mtime_ns}"
            files = sorted((entry.name, entry.stat()) for entry in os.scandir(self.path) if entry.is_file())
        except OSError as error:
            return f"unreadable-{error.errno}"
        text = "\n".join(f"{name} {found.st_size} {found.st_mtime_ns}" for name, found in files)
        return f"{len(files)}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


@dataclass(frozen=True)
class Input:
    """A folder (or one file) that the user names, under the label that stands for it in the manifest."""

    label: str
    path: Path


def parse_inputs(texts: Iterable[str]) -> list[Input]:
    """Inputs from "FOLDER" or "LABEL=FOLDER"; the label is otherwise the last two parts of the path.

    Raises:
        CommandError: a folder is missing, or two have the same label.
    """
    inputs: dict[str, Input] = {}
    for text in texts:
        label, separator, rest = text.partition("=")
        if Path(text).exists() or not separator:
            label, rest = "", text
        path = Path(rest)
        if not path.exists():
            raise CommandError(f"{path} does not exist; name a folder with images")
        label = label or "/".join(path.resolve().parts[-2:]).lstrip("/")
        if label in inputs:
            raise CommandError(
                f"{inputs[label].path} and {path} would both be called {label!r}; name one: OTHER={path}"
            )
        inputs[label] = Input(label, path)
    return list(inputs.values())


def find_sources(inputs: Iterable[Input], but_not: Path | None = None) -> list[Source]:
    """All images below the inputs, sorted by key.

    Args:
        but_not: a folder to stay out of: the store itself.
    """
    found: dict[str, Source] = {}
    for item in inputs:
        for source in _walk(item, but_not.resolve() if but_not else None):
            found[source.key] = source
    return [found[key] for key in sorted(found)]


def _walk(item: Input, but_not: Path | None) -> Iterator[Source]:
    if item.path.is_file():
        yield from _of_file(item)
        return
    closed: list[OSError] = []
    visited: set[Path] = set()
    for folder_text, folders, names in os.walk(item.path, onerror=closed.append, followlinks=True):
        folder = Path(folder_text)
        real = folder.resolve()
        if real in visited or real == but_not:  # a link in a circle, or the store
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from _of_folder(item, folder, sorted(name for name in names if not name.startswith(".")))
    for error in closed:
        yield Source(_key(item, Path(error.filename)), Path(error.filename), "unreadable")


def _of_file(item: Input) -> Iterator[Source]:
    """The source that a single file stands for; a slice stands for its series."""
    if item.path.name.lower().endswith(READABLE_SUFFIXES):
        yield Source(item.label, item.path, "file")
    elif _is_dicom(item.path):
        yield Source(item.label, item.path.parent, "dicom")
    else:
        yield Source(item.label, item.path, "unreadable")


def _of_folder(item: Input, folder: Path, names: list[str]) -> Iterator[Source]:
    holds_dicom = False
    for name in names:
        lower = name.lower()
        if lower.endswith(READABLE_SUFFIXES):
            yield Source(_key(item, folder / name), folder / name, "file")
        elif lower.endswith(UNREADABLE_SUFFIXES):
            yield Source(_key(item, folder / name), folder / name, "unreadable")
        elif not holds_dicom:
            holds_dicom = _is_dicom(folder / name)
    if holds_dicom:
        yield Source(_key(item, folder), folder, "dicom")


def _key(item: Input, path: Path) -> str:
    inside = path.relative_to(item.path).as_posix()
    return item.label if inside == "." else f"{item.label}/{inside}"


def _is_dicom(path: Path) -> bool:
    lower = path.name.lower()
    if lower.endswith(_DICOM_SUFFIXES):
        return True
    if path.suffix and not path.suffix[1:].isdigit():  # 1.2.840.113619 is a name of DICOM, notes.txt is not
        return False
    try:
        with path.open("rb") as stream:
            stream.seek(_DICOM_MAGIC[0])
            return stream.read(4) == _DICOM_MAGIC[1]
    except OSError:
        return False
