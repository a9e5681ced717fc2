"""What the demo says: lines on stdout, and a progress bar on a terminal or a line per tenth elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO


class Console:
    """Writes to the streams that were current when it was made, so that later redirections do not swallow it.

    Args:
        output: for lines; stdout when None.
        terminal: for the progress bar; stderr when None. A bar is drawn only when this is a terminal.
    """

    def __init__(self, output: TextIO | None = None, terminal: TextIO | None = None) -> None:
        self.output = sys.stdout if output is None else output
        self.terminal = sys.stderr if terminal is None else terminal

    def line(self, text: str = "") -> None:
        self.output.write(text + "\n")
        self.output.flush()

    def progress(self, label: str, total: int) -> Progress:
        return Progress(self, label, total)


class Progress:
    """Counts from 0 to ``total``; a context manager.

    Attributes:
        done: steps so far.
    """

    def __init__(self, console: Console, label: str, total: int) -> None:
        self.console, self.label, self.total, self.done = console, label, total, 0
        self._start = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.console.terminal.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.label, file=self.console.terminal, leave=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, note: str = "") -> None:
        """One more step is done.

        Args:
            note: shown behind the bar, or at the end of the line.
        """
        tenths_before = 10 * self.done // self.total
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif 10 * self.done // self.total > tenths_before:
            seconds = time.monotonic() - self._start
            self.console.line(f"{self.label:<8} {self.done:>4}/{self.total} {seconds:5.0f} s  {note}".rstrip())
