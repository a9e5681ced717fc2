"""What a row of every bench holds, and the CSV that rows are written to."""

from __future__ import annotations

import csv
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from medmamba.bench.commit import commit_of
from medmamba.bench.measure import CPU, first_call, peak_mib, time_it

Row = dict[str, Any]

MEASUREMENTS = (
    "first_call_s",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "cpu_min_ms",
    "repeats",
    "ns_per_element",
    "cpu_ns_per_element",
    "peak_mib",
)


def measured(function: Callable[[], object], elements: int, seconds: float, device: torch.device) -> Row:
    """The columns ``MEASUREMENTS``, in order; ``elements`` is the unit of two of them."""
    first = first_call(function, device)
    memory = peak_mib(function, device)
    timing = time_it(function, seconds, device)
    on_gpu = timing.cpu_min is None
    values = (
        round(first, 3),
        round(timing.p20, 4),
        round(timing.p50, 4),
        round(timing.p80, 4),
        "" if timing.cpu_min is None else round(timing.cpu_min, 4),
        timing.repeats,
        round(timing.p50 * 1e6 / elements, 6 if on_gpu else 3),
        "" if timing.cpu_min is None else round(timing.cpu_min * 1e6 / elements, 3),
        "" if memory is None else round(memory, 2),
    )
    return dict(zip(MEASUREMENTS, values, strict=True))


def machine(device: torch.device = CPU) -> dict[str, str]:
    """What the numbers belong to; the same in every row of a file."""
    return {
        "processor": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": version("torch"),
        "medmamba": version("medmamba"),
        "commit": commit_of(Path(__file__)),
    }


def write(rows: Sequence[Row], out: Path, device: torch.device = CPU) -> None:
    """Write rows as CSV, with the machine in the last columns."""
    facts = machine(device)
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def read(file: Path) -> list[Row]:
    """Rows of a CSV that ``write`` made; numbers are text."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
