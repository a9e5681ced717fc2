"""The ``medmamba`` program: finds the commands of all rooms and hands over to one of them.

Commands come from the entry-point group ``medmamba.commands``; this module knows none of them by name and
imports no room, and nothing heavy is imported before a command runs.

Exit codes, the same for every command: 0 all done, 1 internal error, 2 wrong usage or input, 3 some cases
failed, 4 all cases failed, 75 interrupted and resumable, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points, version

from medmamba.command import Command, CommandError

GROUP = "medmamba.commands"
LOGGERS = ("medmamba", "medmamba_kernels", "medmamba_plans", "medmamba_pretrain")
DISCLAIMER = "Research use only, not a medical device. No telemetry: nothing is sent anywhere."
EXIT_CODES = (
    "exit codes: 0 all done, 1 internal error, 2 wrong usage or input, 3 some cases failed, "
    "4 all cases failed, 75 interrupted and resumable, 130 interrupted"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: from argparse, on ``--help``, ``--version`` and wrong usage.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    entries = find_commands()
    if not arguments or arguments[0].startswith("-"):
        parser = _program_parser(entries)
        parser.parse_args(arguments)
        parser.print_help(sys.stderr)
        return 2
    name, *rest = arguments
    if name not in entries:
        known = ", ".join(sorted(entries))
        return _fail("medmamba", f"unknown command {name!r}; known: {known}")
    try:
        with _log_to_stderr():
            exit_code = _run_command(name, _load(entries[name]), rest)
        sys.stdout.flush()  # a reader that left shows up here and not at interpreter exit
        return exit_code
    except CommandError as error:
        return _fail(f"medmamba {name}", str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(f"medmamba {name}", "interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe (head, less) left. Python would complain once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        traceback.print_exc()
        return _fail(f"medmamba {name}", f"internal error: {type(error).__name__}: {error}", 1)


def find_commands() -> dict[str, EntryPoint]:
    """Entry points of all commands by name; on equal names ours comes before a third party's."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: bool(entry.dist and entry.dist.name == "medmamba"))
    return {entry.name: entry for entry in found}


def command_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """The argument parser of one command, as ``medmamba NAME --help`` prints it."""
    parser = argparse.ArgumentParser(prog=f"medmamba {name}", description=command.help, epilog=DISCLAIMER)
    command.configure(parser)
    return parser


def _run_command(name: str, command: Command, arguments: list[str]) -> int:
    if command.hands_over(arguments):
        return command.run(argparse.Namespace(arguments=arguments))
    return command.run(command_parser(name, command).parse_args(arguments))


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """What our packages log from INFO on goes to stderr, one line each; other loggers stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _load(entry: EntryPoint) -> Command:
    source = entry.dist.name if entry.dist else "an unknown distribution"
    try:
        command = entry.load()
    except Exception as error:  # whatever a third party's module raises must not take the program down
        raise CommandError(
            f"{entry.value} of {source} cannot be loaded ({type(error).__name__}: {error}); reinstall {source}",
            exit_code=1,
        ) from error
    if not isinstance(command, Command):
        raise CommandError(
            f"{entry.value} of {source} is a {type(command).__name__}, not a medmamba.command.Command; "
            f"report it to the authors of {source}",
            exit_code=1,
        )
    return command


def _program_parser(entries: dict[str, EntryPoint]) -> argparse.ArgumentParser:
    lines = ["commands (medmamba COMMAND --help says more):"]
    for name in sorted(entries):
        try:
            lines.append(f"  {name:<15} {_load(entries[name]).help}")
        except CommandError as error:
            lines.append(f"  {name:<15} broken: {error}")
    parser = argparse.ArgumentParser(
        prog="medmamba",
        usage="medmamba [--help] [--version] COMMAND ...",
        description="3D Mamba U-Nets for nnU-Net v2.\n\n" + "\n".join(lines),
        epilog=f"{EXIT_CODES}\n\n{DISCLAIMER}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"medmamba {version('medmamba')}")
    return parser


def _fail(who: str, message: str, exit_code: int = 2) -> int:
    print(f"{who}: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
