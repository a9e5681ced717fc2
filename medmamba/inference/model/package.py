"""The folder of a model package: which files it holds, and that they are the ones that were exported."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .problems import ModelRefused, shown

MODEL, CARD, SUMS = "model.json", "MODEL_CARD.md", "SHA256SUMS"
#: What a trained folder of nnU-Net has and a package has not.
TRAINED = "plans.json"
#: Bytes that a text file of a package may have.
LONGEST = {MODEL: 16 * 2**20, CARD: 2**20, SUMS: 2**16}

_WEIGHTS = re.compile(r"fold_(0|[1-9]\d{0,3}|all)\.safetensors", re.ASCII)
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)", re.ASCII)


@dataclass(frozen=True)
class Package:
    """A folder whose names were checked, with the checksums its files must have.

    Attributes:
        folder: of the package.
        sums: file -> SHA-256, for every file but SHA256SUMS.
        id: SHA-256 of SHA256SUMS, which names the content of the whole package.
    """

    folder: Path
    sums: Mapping[str, str]
    id: str

    def check(self, name: str) -> None:
        """Raise unless a file has its checksum.

        Raises:
            ModelRefused: MM-MD-002, MM-MD-003, MM-MD-006.
        """
        with _opened(self.folder / name) as stream:
            digest = hashlib.file_digest(stream, "sha256")
        self._compare(name, digest.hexdigest())

    def read(self, name: str) -> bytes:
        """Content of a file that has its checksum: what was checked is what is returned.

        Raises:
            ModelRefused: as :meth:`check`, and MM-MD-007 for a text file that is too long.
        """
        content = _read(self.folder / name, LONGEST.get(name))
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def _compare(self, name: str, found: str) -> None:
        if found != self.sums[name]:
            raise ModelRefused(
                "MM-MD-006",
                f"{self.folder / name} is not the file that was exported (SHA-256 {found[:12]}..., not "
                f"{self.sums[name][:12]}...); get the package again",
            )


def weights_file(fold: str) -> str:
    """File of a fold: "0" -> ``fold_0.safetensors``."""
    return f"fold_{fold}.safetensors"


def is_fold(fold: object) -> bool:
    """Whether this is a fold's name: "0", "1", ... or "all"."""
    return isinstance(fold, str) and _WEIGHTS.fullmatch(weights_file(fold)) is not None


def open_package(folder: str | os.PathLike[str]) -> Package:
    """Check the names in a package and read its SHA256SUMS; contents are checked when they are read.

    Raises:
        ModelRefused: MM-MD-001 to MM-MD-005, MM-MD-007.
    """
    folder = Path(folder).absolute()
    found = _listed(folder)
    if SUMS not in found or MODEL not in found:
        raise ModelRefused(
            "MM-MD-001",
            f"{folder} is no model package: it has no {MODEL if SUMS in found else SUMS}; give a folder that "
            "`medmamba export` wrote",
        )
    content = _read(folder / SUMS, LONGEST[SUMS])
    sums = _parsed(folder / SUMS, content)
    missing = sorted(({MODEL, CARD} | set(sums)) - found)
    surplus = sorted(found - set(sums) - {SUMS})
    if missing:
        raise ModelRefused("MM-MD-003", f"{folder} has no {', '.join(missing)}; get the package again")
    if surplus:
        raise ModelRefused(
            "MM-MD-004", f"{folder} holds {shown(surplus)}, which {SUMS} does not list; move it out of the package"
        )
    return Package(folder, sums, hashlib.sha256(content).hexdigest())


def sums_of(contents: Mapping[str, str]) -> bytes:
    """Content of SHA256SUMS, as ``sha256sum`` writes it: file -> SHA-256."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(contents.items())).encode("ascii")


def _listed(folder: Path) -> set[str]:
    """Names in the folder, all of them plain files with names of a package."""
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False).st_mode for entry in entries}
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelRefused(
            "MM-MD-001", f"{folder} cannot be opened as a folder ({reason}); give a folder that `medmamba export` wrote"
        ) from error
    if TRAINED in found and MODEL not in found:
        raise ModelRefused(
            "MM-MD-001",
            f"{folder} looks like a trained folder of nnU-Net; make a package of it: medmamba export {folder} -o MODEL",
        )
    for name, mode in found.items():
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a special file"
            raise ModelRefused(
                "MM-MD-002",
                f"{shown(name)} in {folder} is {kind}; a package holds plain files only: copy it with cp -rL, or "
                "remove what does not belong there",
            )
        if name != SUMS and not _is_name(name):
            raise ModelRefused(
                "MM-MD-004", f"{shown(name)} in {folder} is no file of a model package; move it out of the package"
            )
    return set(found)


def _is_name(name: str) -> bool:
    return name in (MODEL, CARD) or _WEIGHTS.fullmatch(name) is not None


def _parsed(path: Path, content: bytes) -> dict[str, str]:
    sums: dict[str, str] = {}
    text = content.decode("ascii", errors="replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise ModelRefused(
                "MM-MD-005",
                f"line {number} of {path} is {shown(line)}; expected a SHA-256, two spaces and a file name, each file "
                "once; get the package again",
            )
        digest, name = match.groups()
        if not _is_name(name):
            raise ModelRefused(
                "MM-MD-002",
                f"line {number} of {path} names {shown(name)}; expected {MODEL}, {CARD} or fold_N.safetensors, without "
                "a path",
            )
        sums[name] = digest
    return sums


def _read(path: Path, longest: int | None) -> bytes:
    with _opened(path) as stream:
        content = stream.read(-1 if longest is None else longest + 1)
    if longest is not None and len(content) > longest:
        raise ModelRefused(
            "MM-MD-007", f"{path} has more than {longest} bytes, which no {path.name} needs; get the package again"
        )
    return content


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """A plain file, to be read. A link or a pipe that took its place since it was listed is not followed."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ModelRefused("MM-MD-002", f"{path} is no plain file; get the package again")
            yield stream
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelRefused("MM-MD-003", f"{path} cannot be read ({reason}); get the package again") from error
