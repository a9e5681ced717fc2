"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from types import TracebackType

from .record import Record

_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts records; a context manager.

    Args:
        total: records to come.
    """

    def __init__(self, total: int) -> None:
        self._total, self._counts = total, Counter[str]()
        self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="image", file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, record: Record) -> None:
        """One more; a rejected one is named at once."""
        self._counts[record.status] += 1
        done = self._counts.total()
        if record.status == "rejected":
            self._say(f"rejected {record.source}: {record.code}: {record.reason}")
        if self._bar is not None:
            self._bar.set_postfix(dict(self._counts), refresh=False)
            self._bar.update()
        elif done == self._total or time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._say(
                f"{done} of {self._total}: " + ", ".join(f"{n} {name}" for name, n in sorted(self._counts.items()))
            )

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        _log.info("%s", line)
