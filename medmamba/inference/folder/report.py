"""The report of a folder: lines of JSON that are only ever appended, each forced to the disk.

Kinds of lines (``record``): ``run`` when a run starts, ``begin`` when it takes up a case, ``case`` when that one is
done, refused or failed, ``end`` when the run ends by itself. A kill can cut the last line short; it is dropped.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmamba.command import CommandError
from medmamba.files import append_line, write_atomically

FORMAT = "medmamba prediction report"
FORMAT_VERSION = 1
NAME = "report.jsonl"
_BEGINNING = b'{"record": "run", "format": '
_OF_A_CASE = ("begin", "case")

Record = dict[str, Any]


def report_name(num_parts: int = 1, part_id: int = 0) -> str:
    """Of the report in an output folder: every part of a run has its own."""
    return NAME if num_parts == 1 else f"report.part-{part_id}-of-{num_parts}.jsonl"


def reports_in(folder: Path) -> list[Path]:
    """All reports of a folder, of whole runs and of parts."""
    parts = (path for path in folder.glob("report.part-*-of-*.jsonl") if path.is_file())
    return sorted([*parts, *([folder / NAME] if (folder / NAME).is_file() else [])])


def read_records(path: Path) -> tuple[list[Record], int]:
    """The lines of a report, and how many are broken (and left out).

    Raises:
        CommandError: it cannot be read, or is no report of a version that we know.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CommandError(f"{path} cannot be read ({error.strerror})") from error
    lines = content.split(b"\n")
    records = [record for record in map(_parsed, lines) if record is not None]
    for record in records:
        if record.get("record") == "run" and (record.get("format"), record.get("version")) != (FORMAT, FORMAT_VERSION):
            raise CommandError(f"{path} is no {FORMAT} of version {FORMAT_VERSION}; choose another output folder")
    broken = sum(1 for line in lines if line) - len(records)
    # A kill can leave the beginning of a first line.
    if not records and not (content.startswith(_BEGINNING) or _BEGINNING.startswith(content)):
        raise CommandError(f"{path} is no {FORMAT}; choose another output folder, or move this file")
    return records, broken


class ReportWriter:
    """Appends to one report.

    Args:
        path: an end that a kill cut short is removed.

    Raises:
        CommandError: it cannot be written; exit code 75 where the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._drop_torn_end()
        except OSError as error:
            raise _not_written(path, error) from error

    def append(self, kind: str, **content: Any) -> Record:
        """Add one line and wait until it is on the disk.

        Raises:
            CommandError: as above.
        """
        record = {"record": kind, **content}
        try:
            append_line(self._path, record)
        except OSError as error:
            raise _not_written(self._path, error) from error
        return record

    def _drop_torn_end(self) -> None:
        content = self._path.read_bytes() if self._path.exists() else b""
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self._path, end)


def finished_cases(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["record"] == "case"]


def unexplained(records: Iterable[Record]) -> Counter[str]:
    """How often a run ended without a word (a kill, a power cut) while it was at a case, by name of the case."""
    open_case: str | None = None
    counts: Counter[str] = Counter()
    for record in records:
        if record["record"] == "run" and open_case is not None:
            counts[open_case] += 1
        open_case = record["case"] if record["record"] == "begin" else None
    if open_case is not None:
        counts[open_case] += 1
    return counts


@dataclass(frozen=True)
class MergedReport:
    """Reports of the parts of a run, or of runs one after the other, as one.

    Attributes:
        runs: their first lines, in the order of their start.
        cases: the last line of every case, by name.
        broken: lines that could not be read.
        unfinished: cases that were begun and have no line.
        missing_parts: (part, of) for parts without a report, where other parts have one.
        models: ids of the models that made what is done; more than one is a mixture.
    """

    runs: Sequence[Record]
    cases: Mapping[str, Record]
    broken: int = 0
    unfinished: Sequence[str] = ()
    missing_parts: Sequence[tuple[int, int]] = ()
    models: Sequence[str] = field(default=())

    @property
    def counts(self) -> dict[str, int]:
        """Cases by status."""
        found = Counter(record["status"] for record in self.cases.values())
        return {status: found[status] for status in ("done", "refused", "failed")}

    def write(self, path: str | Path) -> None:
        """Write it as a report of its own, atomically.

        Raises:
            OSError: the folder is missing, full or not writable.
        """
        lines = [json.dumps(record, ensure_ascii=True) for record in (*self.runs, *self.cases.values())]
        write_atomically(path, lambda temporary: Path(temporary).write_text("\n".join([*lines, ""])))


def merge_reports(paths: Iterable[str | Path]) -> MergedReport:
    """Read reports as one: of several lines about a case the last one counts, by the time it was finished.

    Raises:
        CommandError: one cannot be read, or is no report.
    """
    runs: list[Record] = []
    cases: dict[str, Record] = {}
    begun: set[str] = set()
    broken = 0
    for path in paths:
        records, torn = read_records(Path(path))
        broken += torn
        runs += [record for record in records if record["record"] == "run"]
        begun |= {record["case"] for record in records if record["record"] == "begin"}
        for record in finished_cases(records):
            before = cases.get(record["case"])
            if before is None or before["finished"] <= record["finished"]:
                cases[record["case"]] = record
    done = [record for record in cases.values() if record["status"] == "done"]
    return MergedReport(
        runs=sorted(runs, key=lambda run: run["started"]),
        cases=dict(sorted(cases.items())),
        broken=broken,
        unfinished=sorted(begun - set(cases)),
        missing_parts=_missing_parts(runs),
        models=sorted({record["model"] for record in done}),
    )


def _missing_parts(runs: Iterable[Record]) -> list[tuple[int, int]]:
    found = {(run["part"]["id"], run["part"]["of"]) for run in runs if run["part"] is not None}
    return sorted({(k, of) for _, of in found for k in range(of)} - found)


def _parsed(line: bytes) -> Record | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("record"), str):
        return None
    return content if content["record"] not in _OF_A_CASE or isinstance(content.get("case"), str) else None


def _not_written(path: Path, error: OSError) -> CommandError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"the disk of {path.parent} is full; make room and start the same command again"
        return CommandError(text, exit_code=75)
    return CommandError(f"{path} cannot be written ({error.strerror}); choose another output folder", exit_code=1)
