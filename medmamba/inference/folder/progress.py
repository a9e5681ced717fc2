"""One line per case for whoever watches a run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from medmamba.command import printable


class Progress:
    """Says how far a run is.

    Args:
        total: cases to do.
        say: takes one line.
    """

    def __init__(self, total: int, say: Callable[[str], object]) -> None:
        self._total, self._say = total, say
        self._count = 0
        self._start = time.monotonic()

    def finished(self, record: Mapping[str, Any]) -> None:
        """Say what became of a case; ``record`` is its line in the report."""
        self._count += 1
        elapsed = time.monotonic() - self._start
        end = estimated_end(datetime.now(), elapsed, self._count, self._total)
        self._say(f"[{self._count}/{self._total}] {record['case']}: {_outcome(record)}{end}")


def estimated_end(now: datetime, elapsed_s: float, count: int, total: int) -> str:
    """When the rest is done if it takes as long per case as the first ``count`` did; empty at the end."""
    if count >= total:
        return ""
    end = now + timedelta(seconds=elapsed_s / count * (total - count))
    day = "" if end.date() == now.date() else f"{end:%a} {end.day} {end:%b} "
    return f"; ends about {day}{end:%H:%M}"


def to_stdout(line: str) -> None:
    """Print one line at once; what the terminal cannot print is escaped, and a reader that left is no error."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(printable(line).encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it left; the run goes on, and the report has everything
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _outcome(record: Mapping[str, Any]) -> str:
    if record["status"] == "done":
        notes = len(record["notes"])
        return f"done in {record['seconds']:.0f} s" + (f", {notes} note{'s' * (notes > 1)}" if notes else "")
    error = record["error"]
    return (
        f"{record['status']} while {error['stage']}, {error['id']} {error['code']}: {error['cause']}; {error['remedy']}"
    )
