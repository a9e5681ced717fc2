"""What a store holds, and whether its files still hold it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .store import Store
from .volume import SUFFIX, DamagedVolumeError, Volume, content_hash


@dataclass(frozen=True)
class Summary:
    """Numbers of a store.

    Attributes:
        statuses: sources by status.
        codes: sources that were not accepted, by code.
        volumes, patients, voxels, size_bytes: of what was accepted.
    """

    statuses: Counter[str]
    codes: Counter[str]
    volumes: int
    patients: int
    voxels: int
    size_bytes: int


def summarise(store: Store) -> Summary:
    """From the manifest alone."""
    accepted = list(store.accepted.values())
    return Summary(
        statuses=Counter(record.status for record in store.records.values()),
        codes=Counter(f"{r.status}: {r.code}" for r in store.records.values() if r.status != "accepted"),
        volumes=len(accepted),
        patients=len({record.patient for record in accepted}),
        voxels=sum(r.shape[0] * r.shape[1] * r.shape[2] for r in accepted),
        size_bytes=sum(record.size_bytes for record in accepted),
    )


def verify(store: Store) -> Iterator[tuple[str, str]]:
    """Decompress every volume and compare it with its name.

    Yields:
        (volume id, what is wrong with it or "") for every accepted volume; then files that no record names.
    """
    for volume, record in store.accepted.items():
        try:
            path = store.volume_path(volume)
            found = content_hash(Volume(path).read())
            wrong = "" if found == volume else f"{path} holds other voxels; delete it and ingest again"
        except DamagedVolumeError as error:
            wrong = str(error)
        yield volume, f"{record.source}: {wrong}" if wrong else ""
    for path in sorted(Path(store.folder).glob(f"volumes/*/*/*{SUFFIX}")):
        if not path.name.startswith(".") and path.name.removesuffix(SUFFIX) not in store.accepted:
            yield path.name.removesuffix(SUFFIX), f"{path} is in no record; ingest again, or delete it"
