"""What this process may use of the machine: processors and memory, with the limits of a container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


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


def memory_available(root: Path = _ROOT) -> int | None:
    """Bytes that this process can still take before the system or its control group is full; None if unknown.

    What the system keeps of files in memory counts as available.
    """
    known = [*_system_memory(root), *_group_memory(root)]
    return max(0, min(known)) if known else None


def memory_used(root: Path = _ROOT) -> int | None:
    """Bytes of memory that this process holds now; None where the system does not say."""
    pages = _words(root / "proc/self/statm")
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None


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
    names = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    for controller, (limit_name, used_name) in names.items():
        for folder in _groups(root, controller):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                yield limit - used + _cached(folder)


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
