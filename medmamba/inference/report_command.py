"""``medmamba report``: what became of the cases of a run, or of the parts of one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.command import Command, CommandError, printable

if TYPE_CHECKING:
    from medmamba.inference.folder import MergedReport


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reports",
        type=Path,
        nargs="+",
        metavar="REPORT",
        help="report.jsonl, those of parts, or the folders they are in",
    )
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write them as one report")


def _run(arguments: argparse.Namespace) -> int:
    from medmamba.inference.folder import merge_reports

    merged = merge_reports(path for given in arguments.reports for path in _reports(given))
    for line in _lines(merged):
        print(printable(line))
    if arguments.out is not None:
        try:
            merged.write(arguments.out)
        except OSError as error:
            raise CommandError(f"{arguments.out} cannot be written ({error.strerror}); choose another -o") from error
        print(f"wrote {arguments.out}")
    return _exit_code(merged)


def _reports(given: Path) -> list[Path]:
    from medmamba.inference.folder.report import reports_in

    if not given.is_dir():
        return [given]
    found = reports_in(given)
    if not found:
        raise CommandError(f"{given} holds no report.jsonl; give the output folder of medmamba predict -m")
    return found


def _lines(merged: MergedReport) -> list[str]:
    lines = []
    for name, record in merged.cases.items():
        if record["status"] != "done":
            error = record["error"]
            lines.append(
                f"{name}: {record['status']} while {error['stage']}, {error['id']} {error['code']}: {error['cause']}; "
                f"{error['remedy']}"
            )
    lines += [f"{name}: begun, and not ended: its run was killed" for name in merged.unfinished]
    lines += [f"part {part} of {of} has no report" for part, of in merged.missing_parts]
    if merged.broken:
        lines.append(f"{merged.broken} broken line(s) were left out")
    if len(merged.models) > 1:
        lines.append(f"made by {len(merged.models)} different models: {', '.join(name[:12] for name in merged.models)}")
    counts = ", ".join(f"{count} {status}" for status, count in merged.counts.items())
    seconds = sum(record["seconds"] for record in merged.cases.values())
    return [*lines, f"{counts}; {seconds:.0f} s in all"]


def _exit_code(merged: MergedReport) -> int:
    """As of the run itself: 75 where something is still to do."""
    counts = merged.counts
    if merged.unfinished or merged.missing_parts:
        return 75
    if counts["refused"] + counts["failed"] == 0:
        return 0
    return 3 if counts["done"] else 4


REPORT = Command(
    help="what became of the cases of a prediction: reports of its parts as one", configure=_configure, run=_run
)
