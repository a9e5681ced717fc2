"""How fast an epoch goes while it goes: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class EpochTimes:
    """What the iterations of an epoch took in this process.

    Attributes:
        seconds: from the start of the epoch.
        waited_s: of these, waiting for data.
        iterations: that were done.
    """

    seconds: float
    waited_s: float
    iterations: int

    @property
    def wait_share(self) -> float:
        """Share of the time that was spent waiting for data, 0..1."""
        return self.waited_s / self.seconds if self.seconds > 0 else 0.0


class LiveLine:
    """Shows the iterations of a training; a stream that is closed or broken does not end it.

    Args:
        print_line: takes one line for log and screen.
        epochs: of the whole training.
        iterations: per epoch.
        stream: where to look for a terminal and draw on it; None: standard error.
        every: iterations between two lines where there is no terminal.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        print_line: Callable[[str], None],
        *,
        epochs: int,
        iterations: int,
        stream: TextIO | None = None,
        every: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._print_line = print_line
        self._epochs, self._iterations, self._every = epochs, iterations, every
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._epoch = self._first = self._done = 0
        self._waited_s = 0.0
        self._started = self._ended = clock()
        self._whole_epoch_s: float | None = None
        self._bar: Any = None

    def start(self, epoch: int, iteration: int = 0) -> None:
        """An epoch begins, counted from 0, or goes on after ``iteration`` of its iterations."""
        now = self._clock()
        if self._first == 0 and self._done == self._iterations and epoch == self._epoch + 1:
            self._whole_epoch_s = now - self._started  # with its validation and what it saved
        self._close_bar()
        self._epoch, self._first, self._done = epoch, iteration, 0
        self._waited_s, self._started, self._ended = 0.0, now, now
        if _is_terminal(self._stream):
            self._bar = self._attempt(self._new_bar)

    def iteration(self, loss: float, waited_s: float) -> None:
        """One iteration is over; ``waited_s`` of it went into waiting for its data."""
        self._done += 1
        self._waited_s += waited_s
        self._ended = self._clock()
        if self._bar is not None:
            self._attempt(lambda: self._move_bar(loss))
        elif not _is_terminal(self._stream) and (self._first + self._done) % self._every == 0:
            with suppress(OSError, ValueError):
                self._print_line(self._line(loss))

    def finish(self) -> EpochTimes:
        """The iterations of this epoch are over, or are given up."""
        self._close_bar()
        return self._times

    @property
    def training_left_s(self) -> float | None:
        """Seconds until the whole training is over; None before the first iteration of this process."""
        epoch_left = self._epoch_left_s
        if epoch_left is None:
            return None
        iterations_s = self._iterations * self._times.seconds / self._done
        whole = iterations_s if self._whole_epoch_s is None else max(self._whole_epoch_s, iterations_s)
        return epoch_left + (whole - iterations_s) + (self._epochs - self._epoch - 1) * whole

    @property
    def _times(self) -> EpochTimes:
        return EpochTimes(self._ended - self._started, self._waited_s, self._done)

    @property
    def _epoch_left_s(self) -> float | None:
        if self._done == 0:
            return None
        return (self._iterations - self._first - self._done) * self._times.seconds / self._done

    def _line(self, loss: float) -> str:
        times = self._times
        rate = times.iterations / times.seconds if times.seconds > 0 else 0.0
        return (
            f"epoch {self._epoch}, iteration {self._first + self._done}/{self._iterations}: {rate:.3g} it/s, "
            f"{times.wait_share:.0%} of the time waiting for data, loss {loss:.4f}, "
            f"{duration(self._epoch_left_s)} left of the epoch's iterations, "
            f"{duration(self.training_left_s)} of the training"
        )

    def _new_bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self._iterations,
            initial=self._first,
            desc=f"epoch {self._epoch}",
            file=self._stream,
            leave=False,
            dynamic_ncols=True,
            miniters=1,  # else a thread of tqdm's own would draw as well
        )

    def _move_bar(self, loss: float) -> None:
        wait, left = self._times.wait_share, duration(self.training_left_s)
        self._bar.set_postfix_str(f"loss {loss:.4f}, waits {wait:.0%}, training {left}", refresh=False)
        self._bar.update()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._attempt(self._bar.close)
            self._bar = None

    def _attempt(self, draw: Callable[[], Any]) -> Any:
        """What ``draw`` returns; from the first time on that the stream refuses, nothing is drawn any more."""
        try:
            return draw()
        except (OSError, ValueError):  # a ValueError where it was closed
            if self._bar is not None:
                self._bar.disable = True  # else tqdm tries once more when it is deleted
                self._bar = None
            return None


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds as ``1:02:03``, with ``2 d`` in front where it takes days; ``?`` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hours}:{minutes:02d}:{rest:02d}"


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False
