"""Memory of this process, of the machine, and of the container around it, in bytes; None where nobody says."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")
#: Version 1 says "no limit" with a number near 2^63.
_UNLIMITED = 2**60


def peak_bytes() -> int | None:
    """The most that this process has held since it started."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def resident_bytes() -> int | None:
    """What this process holds now; where the system does not say, the most it has held."""
    try:
        pages = int((_PROC / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return peak_bytes()


def physical_bytes() -> int | None:
    """Of the machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def usable_bytes() -> int | None:
    """What this process may hold at most: of the machine, or of the container that it is in (``--memory``)."""
    known = [limit for limit in (physical_bytes(), *_limits_of_container()) if limit is not None]
    return min(known, default=None)


def _limits_of_container() -> Iterator[int]:
    """Limits of the control groups of this process and of those around them."""
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            root, file = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
            group = Path(name.lstrip("/"))
            for around in (group, *group.parents):
                yield from _number_in(root / around / file)


def _number_in(path: Path) -> Iterator[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return
    if text.isdigit() and int(text) < _UNLIMITED:
        yield int(text)
