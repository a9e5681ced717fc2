"""A store: a folder with ``manifest.jsonl`` and the compressed volumes below ``volumes/``.

The first line of the manifest says what the store was made with. Every further line is one record, appended and
forced to the disk; the last line of a source counts. A kill loses at most what was not yet appended: a line cut short
is dropped when the store is opened for writing, and volumes get their name only when complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medmamba.command import CommandError
from medmamba.files import append_line, try_lock, write_atomically

from .record import Record
from .settings import Settings
from .volume import SUFFIX, volume_path

_log = logging.getLogger(__name__)

FORMAT = "medmamba corpus"
FORMAT_VERSION = 1
MANIFEST = "manifest.jsonl"


class Store:
    """A store, open for reading; :meth:`writing` opens it for one writer.

    Args:
        folder: holds ``manifest.jsonl``.

    Attributes:
        settings: what all volumes were made with.
        records: the last record of every source, in the order of their first.
        torn: broken lines of the manifest.

    Raises:
        CommandError: there is no store, or one of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._manifest = self.folder / MANIFEST
        try:
            lines = self._manifest.read_bytes().split(b"\n")
        except OSError as error:
            raise CommandError(
                f"{self.folder} holds no corpus ({MANIFEST}: {error.strerror}); `medmamba pretrain ingest` makes one"
            ) from error
        header = _parsed(lines[0])
        if header is None or header.get("format") != FORMAT or header.get("version") != FORMAT_VERSION:
            raise CommandError(
                f"{self._manifest} is no corpus manifest of version {FORMAT_VERSION}; write into another folder"
            )
        self.settings = Settings.from_json(header["settings"])
        self._salt = bytes.fromhex(header["salt"])
        self.records: dict[str, Record] = {}
        self._of_volume: dict[str, set[str]] = {}
        self.torn = int(bool(lines[-1]))  # a complete manifest ends with a line's end
        for line in lines[1:-1]:
            content = _parsed(line)
            try:
                record = Record.from_json(content or {})
            except TypeError:
                self.torn += 1
            else:
                self._keep(record)

    @classmethod
    def create(cls, folder: str | Path, settings: Settings) -> Store:
        """An empty store in a new folder, or the one that is there.

        Raises:
            CommandError: a store with other settings is there, or the folder cannot be written.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            header = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "settings": settings.as_json(),
                "salt": secrets.token_hex(16),  # patients' names are hashed with it
                "libraries": _libraries(),
            }
            text = json.dumps(header) + "\n"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / MANIFEST, lambda temporary: Path(temporary).write_text(text))
            except OSError as error:
                raise CommandError(f"{folder} cannot be written ({error.strerror}); choose another --out") from error
        store = cls(folder)
        if store.settings != settings:
            raise CommandError(
                f"{folder} was made with {store.settings.as_json()}, not {settings.as_json()}; "
                "use the same arguments or another --out"
            )
        return store

    @property
    def salt(self) -> bytes:
        """Makes hashed patient names of this store differ from those of others."""
        return self._salt

    @property
    def accepted(self) -> dict[str, Record]:
        """The volumes of the corpus, by id."""
        return {r.volume: r for r in self.records.values() if r.status == "accepted" and r.volume}

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of settings and accepted volumes: equal for stores that hold the same."""
        text = json.dumps([self.settings.as_json(), sorted(self.accepted)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def with_volume(self, volume_id: str | None) -> list[Record]:
        """The records with this content, whatever their status, by source."""
        return [self.records[source] for source in sorted(self._of_volume.get(volume_id or "", ()))]

    def is_accepted(self, volume_id: str | None) -> bool:
        """Whether a volume of the corpus has this content."""
        return any(record.status == "accepted" for record in self.with_volume(volume_id))

    def volume_path(self, volume_id: str) -> Path:
        return volume_path(self.folder, volume_id)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store for this process: mend the manifest, remove what a kill left half-written.

        Raises:
            CommandError: another process writes, or the folder cannot be written.
        """
        try:
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise CommandError(f"{self.folder} cannot be written ({error.strerror})") from error
        with lock:
            if not try_lock(lock.fileno()):
                raise CommandError(f"another process is writing {self.folder}; wait for it or choose another --out")
            if self.torn:
                _log.warning("%s: %d broken lines dropped, their sources are read again", self._manifest, self.torn)
                self._rewrite()
            for half in self.folder.glob(f"volumes/*/*/.*{SUFFIX}.*.tmp"):
                half.unlink()
            yield

    def append(self, record: Record) -> None:
        """Add one record and wait until it is on the disk.

        Raises:
            OSError: the disk is full.
        """
        append_line(self._manifest, record.as_json())
        self._keep(record)

    def _keep(self, record: Record) -> None:
        before = self.records.get(record.source)
        if before is not None and before.volume:
            self._of_volume[before.volume].discard(record.source)
        if record.volume:
            self._of_volume.setdefault(record.volume, set()).add(record.source)
        self.records[record.source] = record

    def _rewrite(self) -> None:
        header = self._manifest.read_bytes().partition(b"\n")[0]
        lines = [header, *(json.dumps(record.as_json()).encode() for record in self.records.values()), b""]
        write_atomically(self._manifest, lambda temporary: Path(temporary).write_bytes(b"\n".join(lines)))
        self.torn = 0


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _libraries() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("medmamba", "blosc2", "numpy", "SimpleITK", "nibabel")}
