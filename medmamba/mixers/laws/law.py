"""A law: what holds, how it is checked, what to do where it is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class LawBroken(AssertionError):
    """A core or a mixer does not keep a law; the text says in one line what was seen, and where."""


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: one or two words, once among the laws of cores and once among those of mixers.
        says: what holds, in one sentence.
        remedy: what to do where it is broken.
        holds: ``holds(subject, case)`` raises :class:`LawBroken`, or any other error, where it does not.
        cases: names of what it is checked on; all of them by default.
    """

    name: str
    says: str
    remedy: str
    holds: Callable[[Any, str], None]
    cases: tuple[str, ...] = ("",)

    def check(self, subject: Any, case: str | None = None) -> None:
        """Check the law on one case, or on all of them.

        Args:
            subject: a core for a law of cores, options of a block for a law of mixers.
            case: one of ``cases``.

        Raises:
            LawBroken: it does not hold, or the subject failed on the way.
        """
        for chosen in self.cases if case is None else (case,):
            try:
                self.holds(subject, chosen)
            except Exception as error:  # a third party's module may fail in any way
                seen = str(error) if isinstance(error, LawBroken) else f"{type(error).__name__}: {error}"
                where = f"{chosen}: " if chosen else ""
                raise LawBroken(where + " ".join(seen.split())) from error

    def __str__(self) -> str:
        return self.name


def require(holds: bool, seen: str) -> None:
    """LawBroken with what was seen, unless it holds."""
    if not holds:
        raise LawBroken(seen)
