"""What stays out of a corpus by wish, above all the test cases of what the weights will be fine-tuned for.

Every line of the list is a path of an image or folder (inside the inputs or not), a source as in a manifest, a patient,
or the content hash of a stored volume. Public collections contain each other's cases, so an excluded image is read too:
whatever has the same stored content is excluded with it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmamba.command import CommandError

from .patients import hashed
from .sources import Input, Source, find_sources

_HASH = re.compile(r"[0-9a-f]{32}")
#: What the keys of sources begin with that only the list names, outside of all inputs.
OUTSIDE = "excluded:"


@dataclass(frozen=True)
class Exclusion:
    """What a list names.

    Attributes:
        keys: sources of the inputs.
        outside: sources that are read only to know their content.
        hashes: content of stored volumes.
        names: everything else: patients, as in the manifest or as DICOM has them.
    """

    keys: frozenset[str] = frozenset()
    outside: tuple[Source, ...] = ()
    hashes: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    def patients(self, salt: bytes) -> frozenset[str]:
        """Patients as they stand in the manifest."""
        return self.names | {hashed(name, salt) for name in self.names}

    def unmatched(self, patients: Container[str], salt: bytes) -> list[str]:
        """Names that are no patient of a store: cases it does not have, or spelling mistakes."""
        return sorted(name for name in self.names if name not in patients and hashed(name, salt) not in patients)


def read_list(path: Path | None, inputs: Sequence[Input], sources: Iterable[Source]) -> Exclusion:
    """The exclusion that a text file states, one entry per line, "#" starts a comment.

    Raises:
        CommandError: the file cannot be read.
    """
    if path is None:
        return Exclusion()
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} cannot be read as text ({error}); give one entry per line") from error
    by_path = {source.path.resolve(): source.key for source in sources}
    by_key = set(by_path.values())
    keys: set[str] = set()
    hashes: set[str] = set()
    names: set[str] = set()
    outside: dict[Path, Source] = {}
    for line in filter(None, lines):
        on_disk = _existing(line, path)
        inside = {f"{item.label}/{line}" for item in inputs} & by_key
        if line in by_key or inside:
            keys |= inside or {line}
        elif on_disk is not None:
            found = find_sources([Input(OUTSIDE + on_disk.resolve().as_posix(), on_disk)])
            if not found:
                names.add(line)  # reported as an entry that matches nothing
            for source in found:
                real = source.path.resolve()
                if real in by_path:
                    keys.add(by_path[real])
                elif source.kind != "unreadable":
                    outside[real] = source
        elif _HASH.fullmatch(line):
            hashes.add(line)
        else:
            names.add(line)
    return Exclusion(frozenset(keys), tuple(outside.values()), frozenset(hashes), frozenset(names))


def _existing(line: str, listed_in: Path) -> Path | None:
    """The file or folder that a line names, from here or from the folder of the list."""
    for candidate in (Path(line), listed_in.parent / line):
        if candidate.exists():
            return candidate
    return None
