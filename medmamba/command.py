"""What a room gives to the ``medmamba`` program: one :class:`Command` per sub-command.

A room lists its commands in the entry-point group ``medmamba.commands`` of its distribution::

    [project.entry-points."medmamba.commands"]
    plan = "medmamba_plans.commands:PLAN"

The module named there is imported to print ``medmamba --help``, so it must be light: torch, numpy, nnU-Net
and the like belong inside ``run``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One sub-command of the ``medmamba`` program.

    Attributes:
        help: one line for the list of commands.
        configure: adds the arguments of this command to its parser.
        run: does the work and returns the exit code (see :mod:`medmamba.cli`).
        passthrough: everything after the name of the command arrives untouched, ``--help`` included, as
            ``args.arguments`` (a list of str); for commands that hand over to another program. A function decides it
            by what was given, for a command that does so sometimes.
    """

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    passthrough: bool | Callable[[Sequence[str]], bool] = False

    def hands_over(self, arguments: Sequence[str]) -> bool:
        """Whether these arguments arrive untouched."""
        return self.passthrough(arguments) if callable(self.passthrough) else self.passthrough


class CommandError(Exception):
    """An error the user can act on: one line with what is wrong and what to do.

    Args:
        message: cause and remedy in one line.
        exit_code: what the program returns; 2 (usage) unless something else fits better.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """A foreign text in one line: what a terminal would obey or cannot print (line ends, control and direction
    characters, bytes that are no text) is escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
