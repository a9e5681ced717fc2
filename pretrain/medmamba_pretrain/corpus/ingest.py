"""Ingesting: which sources are new, what becomes of each, and the manifest that says so."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from medmamba.command import CommandError

from .engine import Engine
from .exclusion import Exclusion
from .patients import patient_of
from .record import Record
from .sources import Source
from .store import Store
from .work import StoreFailedError, Task, work

_log = logging.getLogger(__name__)

#: Reasons that may be gone in the next run although the source is the same.
_NOT_FINAL = ("memory", "internal", "not-opened")


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        read: to be read and stored.
        excluded: by wish; to be read only, for copies of them.
        done: in the manifest already, and unchanged.
        listed: keys of everything that is excluded by wish, done or not.
    """

    read: list[Source] = field(default_factory=list)
    excluded: list[Source] = field(default_factory=list)
    done: list[Source] = field(default_factory=list)
    listed: set[str] = field(default_factory=set)


def plan(store: Store, sources: Iterable[Source], exclusion: Exclusion) -> Plan:
    """Sort the sources by what is to be done with them."""
    result = Plan()
    patients = exclusion.patients(store.salt)
    everything = [*exclusion.outside, *sources]
    result.listed.update(source.key for source in exclusion.outside)
    for source in everything:
        known = store.records.get(source.key)
        owner = known.patient if known else patient_of(source.key, store.settings.patients)
        if source.key in exclusion.keys or owner in patients:
            result.listed.add(source.key)
    unwanted = {store.records[key].volume for key in result.listed if key in store.records} | exclusion.hashes
    for source in everything:
        if _is_done(store, source, source.key in result.listed, unwanted - {None}):
            result.done.append(source)
        else:
            (result.excluded if source.key in result.listed else result.read).append(source)
    return result


def _is_done(store: Store, source: Source, is_listed: bool, unwanted: Container[str | None]) -> bool:
    """Whether the record of a source is what this run would write.

    Args:
        unwanted: contents that are known to be excluded.
    """
    record = store.records.get(source.key)
    if record is None or record.stamp != source.stamp or record.code in _NOT_FINAL:
        return False
    if is_listed or record.code == "listed":
        return is_listed and record.code == "listed"
    if record.status == "excluded" or record.volume in unwanted:
        return record.status == "excluded" and record.volume in unwanted
    if record.status == "accepted" and record.volume:
        path = store.volume_path(record.volume)
        return path.exists() and path.stat().st_size == record.size_bytes
    return record.status == "rejected" or store.is_accepted(record.volume)


def ingest(
    store: Store, todo: Plan, exclusion: Exclusion, engine: Engine, on_record: Callable[[Record], None]
) -> Counter[str]:
    """Do what is planned; ``store`` is open for writing.

    Args:
        on_record: called after each record is on the disk.

    Returns:
        How many sources of this run got which status.

    Raises:
        CommandError: the store cannot be written, or a process was killed; the same command continues.
    """
    counts: Counter[str] = Counter()
    patients = exclusion.patients(store.salt)
    for record in _results(store, todo, engine):
        final = _decided(store, record, exclusion.hashes, lambda r: r.source in todo.listed or r.patient in patients)
        before = store.records.get(final.source)
        _append(store, final)
        if before is not None and before.status == "accepted" and not store.is_accepted(before.volume):
            _without_volume(store, before)  # the source has changed, or is not wanted any more
        counts[final.status] += 1
        on_record(final)
        if final.status == "excluded":
            _exclude_copies(store, final)
    return counts


def _results(store: Store, todo: Plan, engine: Engine) -> Iterator[Record]:
    # What is excluded comes first: its copies are then known before they are met.
    tasks = [Task(source, store.folder.resolve(), store.settings, store.salt, write=False) for source in todo.excluded]
    tasks += [Task(source, store.folder.resolve(), store.settings, store.salt) for source in todo.read]
    try:
        yield from engine.map(work, tasks)
    except StoreFailedError as error:
        raise CommandError(f"{error}; make room or set rights, then the same command continues", 75) from error
    except CommandError:
        raise
    except Exception as error:
        if type(error).__name__ not in ("TerminatedWorkerError", "BrokenProcessPool", "KilledWorker"):
            raise
        raise CommandError(
            "a process was killed, most likely for lack of memory; the same command with fewer --jobs continues", 75
        ) from error


def _append(store: Store, record: Record) -> None:
    try:
        store.append(record)
    except OSError as error:
        raise CommandError(
            f"the manifest in {store.folder} cannot be written ({error.strerror}); the same command continues", 75
        ) from error


def _decided(
    store: Store, record: Record, hashes: Container[str | None], is_listed: Callable[[Record], bool]
) -> Record:
    """Accepted, duplicate or excluded."""
    if is_listed(record):
        reason = "on the list of what stays out"
        if record.status == "rejected":
            reason += f"; not read ({record.code}: {record.reason}), so that copies of it are not recognised"
        return _without_volume(store, replace(record, status="excluded", code="listed", reason=reason))
    if record.status == "rejected":
        return record
    if record.volume in hashes:
        reason = "its content is on the list of what stays out"
        return _without_volume(store, replace(record, status="excluded", code="content", reason=reason))
    twins = [twin for twin in store.with_volume(record.volume) if twin.source != record.source]
    for twin in twins:
        if is_listed(twin):
            return _without_volume(store, _copy_of(record, twin, "excluded"))
    for twin in twins:
        if twin.status == "accepted":
            return _copy_of(record, twin, "duplicate")
    return record


def _copy_of(record: Record, twin: Record, status: Literal["duplicate", "excluded"]) -> Record:
    return replace(record, status=status, code="copy", reason=f"same content as {twin.source}", size_bytes=0)


def _exclude_copies(store: Store, excluded: Record) -> None:
    """Take out what was accepted from the same content, in this run or an earlier one."""
    for record in store.with_volume(excluded.volume):
        if record.status in ("accepted", "duplicate"):
            _append(store, _without_volume(store, _copy_of(record, excluded, "excluded")))
            _log.warning("%s taken out: same content as %s", record.source, excluded.source)


def _without_volume(store: Store, record: Record) -> Record:
    if record.volume:
        store.volume_path(record.volume).unlink(missing_ok=True)
    return replace(record, size_bytes=0)
