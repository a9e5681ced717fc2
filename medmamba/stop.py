"""Ending a run from outside: at the next point where nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

#: What a program returns that was asked to stop and goes on where it was when it is started again (EX_TEMPFAIL).
EXIT_INTERRUPTED = 75
#: What schedulers, container engines and people send some time before they kill.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class Stopped(Exception):
    """Work was given up half done because somebody asked for it; nothing is wrong with it."""


class StopRequest:
    """Whether SIGTERM, SIGINT or SIGUSR1 came since ``with``; a second SIGINT interrupts at once.

    Schedulers and container engines send SIGTERM, or SIGUSR1 if asked to, some time before they kill. Nothing happens
    within the handler but a note, so a signal is harmless wherever it arrives. Python gives signals to the main thread
    alone: in another one nothing is asked for.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._handlers = ExitStack()

    def __enter__(self) -> StopRequest:
        self._handlers.enter_context(handling(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True


@contextmanager
def exit_when_asked() -> Iterator[None]:
    """Within ``with``, one of the signals of :class:`StopRequest` ends the program at once, with its code.

    For work that is begun anew when the program is started again.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_INTERRUPTED)

    with handling(leave):
        yield


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within ``with``, the signals that ask to stop go to ``handler``; in the main thread, no other one gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
