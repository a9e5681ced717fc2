"""Noting a request to stop."""

from __future__ import annotations

import signal
import threading

import pytest

from medmamba.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_is_noted_and_nothing_else_happens(number):
    with StopRequest() as stop:
        assert not stop.is_asked
        signal.raise_signal(number)
        assert stop.is_asked


def test_a_second_interrupt_is_one():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.is_asked


def test_the_handlers_before_are_back_afterwards():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before


def test_in_another_thread_nothing_is_asked_for():
    asked = []

    def work() -> None:
        with StopRequest() as stop:
            asked.append(stop.is_asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
