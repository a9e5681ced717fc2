"""Processor time, wall time and peak memory of a function."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repeats: wall time at three quantiles, and the least processor time of all threads."""

    p20: float
    p50: float
    p80: float
    cpu_min: float
    repeats: int


def time_it(function: Callable[[], object], seconds: float) -> Timing:
    """Call once to warm up, then repeatedly for about ``seconds`` (at least 3 times, at most 200)."""
    function()
    wall: list[float] = []
    cpu: list[float] = []
    end = time.perf_counter() + seconds
    while len(wall) < 3 or (time.perf_counter() < end and len(wall) < 200):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    quantiles = statistics.quantiles(wall, n=10, method="inclusive")
    return Timing(quantiles[1] * 1e3, quantiles[4] * 1e3, quantiles[7] * 1e3, min(cpu) * 1e3, len(wall))


def peak_mib(function: Callable[[], object]) -> float | None:
    """Memory that the process needed above what it held before the call, in MiB; None where Linux cannot tell.

    The high-water mark of the resident set is reset first. Freed memory that the allocator kept can hide part of it,
    so this is a lower bound.
    """
    try:
        _CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
        function()
        return max(0.0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def copy_bandwidth() -> float:
    """Bytes per second of a large copy (bytes read plus bytes written), for the memory floor."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    timing = time_it(lambda: target.copy_(source), 0.5)
    return 2 * 4 * source.numel() / (timing.p20 * 1e-3)
