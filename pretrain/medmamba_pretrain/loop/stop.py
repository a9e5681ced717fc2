"""Ending a run from outside: after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Whether SIGTERM, SIGINT or SIGUSR1 came since ``with``; a second SIGINT interrupts at once.

    Schedulers send SIGTERM, or SIGUSR1 if asked to, some time before they kill. Nothing happens within the handler but
    a note, so a signal is harmless wherever it arrives.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
