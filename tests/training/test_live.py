"""What is seen of a training while it runs, and that nothing that happens to the screen ends it."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest

from medmamba.training.live import EpochTimes, LiveLine, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(Terminal):
    """A terminal that hung up after some writes."""

    def __init__(self, writes: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = writes, error

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


def run(live: LiveLine, clock: Clock, epoch: int, iterations: int, first: int = 0, seconds: float = 2.0) -> EpochTimes:
    live.start(epoch, first)
    for _ in range(iterations):
        clock.now += seconds
        live.iteration(-0.5, seconds / 4)
    return live.finish()


def test_without_a_terminal_there_is_a_line_now_and_then():
    clock, lines, stream = Clock(), [], io.StringIO()
    live = LiveLine(lines.append, epochs=10, iterations=100, every=40, stream=stream, clock=clock)
    assert run(live, clock, 3, 100) == EpochTimes(200.0, 50.0, 100)
    assert lines == [
        "epoch 3, iteration 40/100: 0.5 it/s, 25% of the time waiting for data, loss -0.5000, "
        "0:02:00 left of the epoch's iterations, 0:22:00 of the training",
        "epoch 3, iteration 80/100: 0.5 it/s, 25% of the time waiting for data, loss -0.5000, "
        "0:00:40 left of the epoch's iterations, 0:20:40 of the training",
    ]
    assert stream.getvalue() == ""


def test_the_time_of_a_training_holds_what_comes_between_the_epochs():
    clock, lines = Clock(), []
    live = LiveLine(lines.append, epochs=3, iterations=10, every=5, stream=io.StringIO(), clock=clock)
    run(live, clock, 0, 10)
    clock.now += 30  # validation
    live.start(1)
    for _ in range(5):
        clock.now += 2
        live.iteration(0.0, 0.0)
    assert live.training_left_s == 10 + 30 + (20 + 30)


def test_an_epoch_that_goes_on_in_the_middle_counts_on():
    clock, lines = Clock(), []
    live = LiveLine(lines.append, epochs=2, iterations=10, every=4, stream=io.StringIO(), clock=clock)
    assert live.training_left_s is None
    assert run(live, clock, 0, 3, first=7) == EpochTimes(6.0, 1.5, 3)
    assert [line.partition(":")[0] for line in lines] == ["epoch 0, iteration 8/10"]
    clock.now += 100
    live.start(1)  # the part of an epoch says nothing about the length of a whole one
    clock.now += 2
    live.iteration(0.0, 0.0)
    assert live.training_left_s == 9 * 2


def test_an_epoch_without_an_iteration_has_no_share_of_waiting():
    live = LiveLine(lambda line: None, epochs=1, iterations=10, stream=io.StringIO(), clock=Clock())
    live.start(0)
    times = live.finish()
    assert times == EpochTimes(0.0, 0.0, 0)
    assert times.wait_share == 0


def test_a_terminal_has_a_bar_and_no_lines():
    clock, lines, terminal = Clock(), [], Terminal()
    live = LiveLine(lines.append, epochs=2, iterations=4, every=1, stream=terminal, clock=clock)
    live.start(0, 1)
    live._bar.mininterval = 0  # tqdm has a clock of its own
    for _ in range(3):
        clock.now += 2
        live.iteration(-0.25, 1.0)
    live.finish()
    assert lines == []
    drawn = terminal.getvalue()
    assert "epoch 0" in drawn
    assert "4/4" in drawn
    assert "loss -0.2500, waits 50%, training 0:00:08" in drawn


@pytest.mark.parametrize("writes", [0, 1, 2, 5])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file")])
def test_a_terminal_that_hangs_up_ends_no_training(writes, error):
    clock, lines = Clock(), []
    live = LiveLine(lines.append, epochs=2, iterations=50, every=1, stream=Broken(writes, error), clock=clock)
    assert run(live, clock, 0, 50) == EpochTimes(100.0, 25.0, 50)
    assert run(live, clock, 1, 50) == EpochTimes(100.0, 25.0, 50)


def test_a_closed_stream_ends_no_training():
    clock, lines, stream = Clock(), [], io.StringIO()
    stream.close()
    live = LiveLine(lines.append, epochs=1, iterations=2, every=1, stream=stream, clock=clock)
    run(live, clock, 0, 2)
    assert len(lines) == 2


def test_a_line_that_cannot_be_printed_ends_no_training():
    def refuse(line: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    clock = Clock()
    live = LiveLine(refuse, epochs=1, iterations=2, every=1, stream=io.StringIO(), clock=clock)
    assert run(live, clock, 0, 2).iterations == 2


CHILD = textwrap.dedent("""
    import sys
    from medmamba.training.live import LiveLine
    live = LiveLine(print, epochs=1, iterations=200, every=100)
    live.start(0)
    for _ in range(200):
        live.iteration(0.5, 0.0)
    live.finish()
    print("survived", flush=True)
""")


def test_a_real_terminal_that_closes_ends_no_training():
    ours, theirs = pty.openpty()
    os.close(ours)
    child = subprocess.run([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=theirs, timeout=300)
    os.close(theirs)
    assert (child.returncode, child.stdout.split()[-1:]) == (0, [b"survived"])


def test_standard_error_that_is_a_pipe_gets_nothing():
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300)
    assert child.stderr == ""
    assert len(re.findall("^epoch 0, iteration", child.stdout, re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (200_000, "2 d 7:33:20"), (None, "?")],
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text
