"""Processor time, wall time and peak memory of a function, on the CPU or on a GPU."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repeats: wall time at three quantiles, and the least processor time of all threads.

    On a GPU the wall time is the device's, between two events, and there is no processor time.
    """

    p20: float
    p50: float
    p80: float
    cpu_min: float | None
    repeats: int


def first_call(function: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds of one call to its end; the first one compiles whatever is compiled."""
    start = time.perf_counter()
    function()
    _finish(device)
    return time.perf_counter() - start


def time_it(function: Callable[[], object], seconds: float, device: torch.device = CPU) -> Timing:
    """Call repeatedly for about ``seconds``, at most 200 times; call it once before to warm up.

    At least 3 times, or as often as ten times ``seconds`` allow where that is less.
    """
    timed = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    wall: list[float] = []
    cpu: list[float] = []
    start = time.perf_counter()
    while len(wall) < 200:
        spent = time.perf_counter() - start
        if wall and spent >= seconds * (1 if len(wall) >= 3 else 10):
            break
        wall_ms, cpu_ms = timed(function)
        wall.append(wall_ms)
        cpu.append(cpu_ms)
    quantiles = statistics.quantiles(wall * 2 if len(wall) == 1 else wall, n=10, method="inclusive")
    return Timing(
        quantiles[1], quantiles[4], quantiles[7], None if device.type == "cuda" else min(cpu), repeats=len(wall)
    )


def _time_on_cpu(function: Callable[[], object]) -> tuple[float, float]:
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    function()
    return (time.perf_counter() - wall_start) * 1e3, (time.process_time() - cpu_start) * 1e3


def _time_on_gpu(function: Callable[[], object]) -> tuple[float, float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), 0.0


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(function: Callable[[], object], device: torch.device = CPU) -> float | None:
    """Memory that a call needs above what was held before it, in MiB; None where Linux cannot tell.

    On a GPU: what torch's allocator handed out. On the CPU: resident memory, whose high-water mark is reset first;
    what the C allocator still holds from before is given back first where it can be, else it hides a part.
    """
    if device.type == "cuda":
        _finish(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _finish(device)
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        _give_back_freed_memory()
        _CLEAR_REFS.write_text("5")
        resident = _resident("VmRSS")
        function()
        return max(0.0, _resident("VmHWM") - resident)
    except OSError:
        return None


def available_bytes(device: torch.device) -> int | None:
    """Memory that a call could still take, or None where it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _give_back_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not the GNU C library
        return


def _resident(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def copy_bandwidth(device: torch.device = CPU) -> float:
    """Bytes per second of a large copy (bytes read plus bytes written), for the memory floor."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    first_call(lambda: target.copy_(source), device)
    timing = time_it(lambda: target.copy_(source), 0.5, device)
    return 2 * 4 * source.numel() / (timing.p20 * 1e-3)
