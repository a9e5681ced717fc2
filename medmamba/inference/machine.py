"""What this process may use of the machine: processors and memory, with the limits of a container."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
#: Version 1 of control groups says "no limit" with a number near 2^63.
_UNLIMITED = 2**60


def threads_available(root: Path = _ROOT) -> int:
    """Processors that this process may keep busy: at least 1.

    The least of those that it may run on and of the CPU quotas of its control groups (version 1 and 2), rounded up.
    More threads than a quota allows are stopped by the system in turns, all of them for the slowest.

    Args:
        root: of the file system, for tests.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    counts = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    counts += [math.ceil(quota) for quota in _cpu_quotas(root)]
    return max(1, min(counts))


def available_bytes(root: Path = _ROOT) -> int | None:
    """Bytes that this process can still take before the system or its control group is full; None if unknown.

    What the system keeps of files in memory counts as available.
    """
    known = [*_system_memory(root), *_group_memory(root)]
    return max(0, min(known)) if known else None


def usable_bytes(root: Path = _ROOT) -> int | None:
    """Bytes that this process may hold at most: of the machine, or of the container that it is in (``--memory``)."""
    limits = (limit for limit, _ in _memory_limits(root))
    return min((each for each in (physical_bytes(), *limits) if each is not None), default=None)


def physical_bytes() -> int | None:
    """Memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def resident_bytes(root: Path = _ROOT) -> int | None:
    """Bytes of memory that this process holds now; where the system does not say, the most that it has held."""
    pages = _words(root / "proc/self/statm")
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else peak_bytes()


def peak_bytes() -> int | None:
    """The most bytes that this process has held since it started; None where the system does not say.

    Linux counts in ``ru_maxrss`` what the process that started this one held at that time, which may be more.
    """
    words = _words(_ROOT / "proc/self/status")
    if "VmHWM:" in words:
        return int(words[words.index("VmHWM:") + 1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _cpu_quotas(root: Path) -> Iterator[float]:
    for folder in _groups(root, ""):
        words = _words(folder / "cpu.max")  # "400000 100000", or "max 100000"
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            yield int(words[0]) / int(words[1])
    for folder in _groups(root, "cpu"):
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and period and quota > 0:
            yield quota / period


def _system_memory(root: Path) -> Iterator[int]:
    words = _words(root / "proc/meminfo")
    if "MemAvailable:" in words:
        yield int(words[words.index("MemAvailable:") + 1]) * 1024


def _group_memory(root: Path) -> Iterator[int]:
    for limit, folder in _memory_limits(root):
        used = _number(folder / ("memory.current" if (folder / "memory.max").exists() else "memory.usage_in_bytes"))
        if used is not None:
            yield limit - used + _cached(folder)


def _memory_limits(root: Path) -> Iterator[tuple[int, Path]]:
    """Limits of the control groups around this process, and their folders."""
    for controller, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        for folder in _groups(root, controller):
            limit = _number(folder / name)
            if limit is not None and limit < _UNLIMITED:
                yield limit, folder


def _cached(folder: Path) -> int:
    """Bytes of files that a group's memory holds and gives back first."""
    words = _words(folder / "memory.stat")
    for name in ("total_inactive_file", "inactive_file"):  # version 1 says "total" for a group with its children
        if name in words:
            return int(words[words.index(name) + 1])
    return 0


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folder of this process's control group and of all groups around it; "" is the one tree of version 2.

    Inside a container, the path may be the host's, of which only the top of the tree is mounted; so files may be
    missing.
    """
    base = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inside = PurePosixPath(path.lstrip("/"))
            mounts = {base / controllers, base / controller} if controller else {base, base / "unified"}
            yield from (mount / part for mount in mounts for part in (inside, *inside.parents))
            return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].lstrip("-").isdigit() else None
