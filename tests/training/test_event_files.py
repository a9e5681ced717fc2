"""The curve of a run is whole however fast its processes follow on each other."""

from __future__ import annotations

import logging
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medmamba.training.event_files import event_writer


def curve(folder) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]


def write(folder, start: int, end: int, life: float) -> None:
    with event_writer(folder, start) as writer:
        for step in range(start, end):
            writer.add_scalar("loss", life, step)


@pytest.mark.parametrize("host", ["!", "zz"])
def test_a_process_restarted_within_a_second_continues_the_curve(tmp_path, host):
    """Whatever the host that wrote before, whose name comes next in the order of the files."""
    write(tmp_path, 0, 3, 1.0)
    (first,) = tmp_path.iterdir()
    second = first.name.split(".")[3]
    first.rename(tmp_path / f"events.out.tfevents.{second}.{host}.1.0")
    write(tmp_path, 2, 5, 2.0)
    assert curve(tmp_path) == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_a_clock_that_is_far_behind_is_a_warning_and_no_wait(tmp_path, caplog):
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 1000}.host.1.0").touch()
    with caplog.at_level(logging.WARNING):
        write(tmp_path, 0, 1, 1.0)
    assert "of the future" in caplog.text


def test_a_folder_that_is_missing_is_made(tmp_path):
    write(tmp_path / "new", 0, 2, 1.0)
    assert curve(tmp_path / "new") == [(0, 1.0), (1, 1.0)]
