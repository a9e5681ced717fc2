"""``medmamba check``. Light, and outside of the package of its work, which imports the image libraries."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.command import Command, CommandError

if TYPE_CHECKING:
    from medmamba.inference.check import Case, LabelCheck

_MOST_NAMES = 5


def _configure_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of images, or one image")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON lines, one per case; default where nobody looks on")
    form.add_argument("--table", action="store_true", help="a table; default on a terminal")
    parser.add_argument("--channels", type=_positive, metavar="N", help="files per case; default: as most cases have")
    parser.add_argument("--volume", type=int, metavar="N", help="of files with several volumes, from 0")
    parser.add_argument(
        "--prefer",
        choices=["sform", "qform"],
        default="sform",
        metavar="FORM",
        help="sform (default) or qform: which one counts where both are set",
    )
    parser.add_argument("--labels", type=Path, metavar="FOLDER", help="label maps to check with the images")
    parser.add_argument(
        "--allow-shift", action="store_true", help="take label maps that lie elsewhere than their image, with a note"
    )
    parser.add_argument("--ct", action="store_true", help="the images are CTs: refuse what cannot be HU")
    parser.add_argument("--force", action="store_true", help="take values that no scanner gives, with a note")


def _run_check(arguments: argparse.Namespace) -> int:
    from medmamba.inference.check import Reading, check_cases, show
    from medmamba.inference.reading.content import Policy

    cases = _cases(arguments.folder, arguments.channels)
    checks = [_label_check(arguments.labels, cases, arguments.allow_shift)] if arguments.labels else []
    policy = Policy(is_ct=arguments.ct, force=arguments.force)
    as_table = arguments.table or (not arguments.json and sys.stdout.isatty())
    width = show.width_of(case.id for case in cases)
    if as_table:
        print(show.table_head(width))
    counts: Counter[str] = Counter()
    refused = 0
    for report in check_cases(cases, Reading(policy, arguments.volume, arguments.prefer), checks):
        lines = show.table_lines(report, width) if as_table else [show.json_line(report)]
        print("\n".join(lines), flush=True)
        counts[show.outcome(report)] += 1
        refused += report.status == "refused"
    print(show.summary(counts), file=sys.stderr)
    return 0 if not refused else 4 if refused == len(cases) else 3


def _cases(folder: Path, channels: int | None) -> Sequence[Case]:
    from medmamba.inference.check import find_cases, show

    if not folder.exists():
        raise CommandError(f"{folder} does not exist; give a folder of images")
    try:
        found = find_cases(folder, channels)
    except OSError as error:
        raise CommandError(f"{folder} cannot be read ({error.strerror or error}); check its rights") from error
    names = ", ".join(map(show.printable, found.ignored[:_MOST_NAMES])) + ", ..." * (len(found.ignored) > _MOST_NAMES)
    if not found.cases:
        raise CommandError(f"{folder} holds no image ({names or 'nothing at all'}); see docs/how-to/check-images.md")
    if found.ignored:
        print(f"{len(found.ignored)} no image of a format that is read: {names}", file=sys.stderr)
    return found.cases


def _label_check(folder: Path, cases: Sequence[Case], allow_shift: bool) -> LabelCheck:
    from medmamba.inference.check import LabelCheck, show

    labels = {}
    for label in _cases(folder, 1):
        if label.problem is not None:
            raise CommandError(f"{folder}: {label.problem.text}")
        labels[label.id] = label.files[0]
    alone = sorted(set(labels) - {case.id for case in cases})
    if alone:
        names = ", ".join(map(show.printable, alone[:_MOST_NAMES])) + ", ..." * (len(alone) > _MOST_NAMES)
        print(f"{len(alone)} label maps without an image: {names}", file=sys.stderr)
    return LabelCheck(labels, allow_shift)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


CHECK = Command(
    help="which images of a folder can be predicted, and what is odd about them",
    configure=_configure_check,
    run=_run_check,
)
