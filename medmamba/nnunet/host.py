"""nnU-Net's console commands, called in this process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from types import FrameType

from medmamba.command import CommandError
from medmamba.nnunet.errors import UserFacingError
from medmamba.nnunet.lookup import trainers_resolvable
from medmamba.stop import EXIT_INTERRUPTED, handling

logger = logging.getLogger(__name__)


def console_commands() -> dict[str, EntryPoint]:
    """nnU-Net's console commands by name, as its installation declares them.

    Raises:
        CommandError: nnunetv2 is not installed.
    """
    try:
        entries = distribution("nnunetv2").entry_points
    except PackageNotFoundError:
        raise CommandError("nnunetv2 is not installed; pip install 'nnunetv2>=2.8,<3'") from None
    return {entry.name: entry for entry in sorted(entries) if entry.group == "console_scripts"}


def run_console_command(name: str, arguments: Sequence[str]) -> int:
    """Run one of nnU-Net's commands with our trainers resolvable, and return its exit code.

    Raises:
        CommandError: no such command, or an error of ours that the user can act on.
    """
    commands = console_commands()
    if name not in commands:
        raise CommandError(f"nnU-Net has no command {name!r}; known: {', '.join(commands)}")
    with trainers_resolvable(), _command_line([name, *arguments]):
        entry_point = commands[name].load()
        try:
            entry_point()
        except UserFacingError as error:
            raise CommandError(str(error)) from error
        except SystemExit as exit_request:
            return _exit_code(exit_request)
        except Exception as error:
            # torch.multiprocessing's error for a process that has ended with a code; not imported for its sake alone.
            if getattr(error, "exit_code", None) != EXIT_INTERRUPTED:
                raise
            return EXIT_INTERRUPTED
    return 0


@contextmanager
def passing_signals_on() -> Iterator[None]:
    """Within ``with``, a signal that asks to stop reaches the processes that this one has started, and not this one.

    For trainings on several GPUs, where this process only waits. One that trains takes the signals itself.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        children = multiprocessing.active_children()
        for child in children:
            if child.pid is not None:
                os.kill(child.pid, number)
        if not children:
            raise SystemExit(EXIT_INTERRUPTED)

    with handling(pass_on):
        yield


def _exit_code(exit_request: SystemExit) -> int:
    if exit_request.code is None or isinstance(exit_request.code, int):
        return exit_request.code or 0
    logger.error("%s", exit_request.code)
    return 1


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = arguments
    try:
        yield
    finally:
        sys.argv = before
