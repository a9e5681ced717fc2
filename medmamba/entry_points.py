"""What other distributions add by name: mixers (group ``medmamba.mixers``) and cores (``medmamba.cores``).

On equal names ours counts, as with commands: a plans file that names one of ours means the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

Entry = TypeVar("Entry")


def entry(group: str, name: str, ours: Mapping[str, Entry], word: str, problem: Callable[[object], str]) -> Entry:
    """Ours of this name, or else what an entry point of another distribution leads to.

    Args:
        group: of the entry points.
        name: of one of them.
        ours: by name; an entry point of such a name is not looked at.
        word: what is looked for, for the message.
        problem: says of what an entry point leads to what is wrong with it, or nothing.

    Raises:
        KeyError: an unknown name; the message lists the known ones.
        TypeError: an entry point that leads to something else.
        Exception: whatever a third party's module raises when it is imported.
    """
    if name in ours:
        return ours[name]
    theirs = entry_points(group=group)
    for point in theirs.select(name=name):
        found = point.load()
        wrong = problem(found)
        if wrong:
            raise TypeError(f"entry point {group}: {name} leads to {wrong}")
        return found
    known = ", ".join(sorted({*ours, *theirs.names}))
    raise KeyError(f"no {word} {name!r}; known: {known}")


def distributions_of(group: str, name: str) -> list[str]:
    """Distributions that have an entry point of this name, with their versions."""
    found = entry_points(group=group).select(name=name)
    return sorted({f"{point.dist.name} {point.dist.version}" for point in found if point.dist is not None})
