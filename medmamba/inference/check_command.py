"""``medmamba check``. Light, and outside of the package of its work, which imports the image libraries."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.command import Command, CommandError, printable

if TYPE_CHECKING:
    from medmamba.inference.check import Case, LabelCheck, Reading
    from medmamba.inference.check.case_report import Check
    from medmamba.inference.check.estimate import Estimate
    from medmamba.inference.model import Model

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
    parser.add_argument(
        "--overlays", type=Path, metavar="FOLDER", help="with --labels: pictures of those that lie elsewhere go here"
    )
    parser.add_argument("--ct", action="store_true", help="the images are CTs: refuse what cannot be HU")
    parser.add_argument("--force", action="store_true", help="take values that no scanner gives, with a note")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="model package: compare with its training images, and say what prediction takes",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="with --model: where results will go, for its disk"
    )
    parser.add_argument(
        "--no-timing", action="store_false", dest="timing", help="with --model: do not run it once; no time, no memory"
    )


def _run_check(arguments: argparse.Namespace) -> int:
    from medmamba.inference.check import check_cases, show

    model = _model(arguments)
    cases = _cases(arguments.folder, model.channel_names if model else arguments.channels)
    reports = check_cases(cases, _reading(arguments, model), _checks(arguments, cases, model))
    estimate = _estimate(model, arguments.timing) if model else None
    table = show.Table(show.width_of(case.id for case in cases), costs=estimate is not None)
    as_table = arguments.table or (not arguments.json and sys.stdout.isatty())
    if as_table:
        print(table.head())
    checked = []
    for report in map(estimate.added_to, reports) if estimate else reports:
        print("\n".join(table.lines(report)) if as_table else show.json_line(report), flush=True)
        checked.append(report)
    print(show.summary(Counter(map(show.outcome, checked))), file=sys.stderr)
    if estimate:
        totals = estimate.totals(checked, arguments.output)
        if not as_table:
            print(show.json_totals(totals))
        print("\n".join(show.totals_lines(totals)), file=sys.stderr)
    refused = sum(report.status == "refused" for report in checked)
    return 0 if not refused else 4 if refused == len(cases) else 3


def _model(arguments: argparse.Namespace) -> Model | None:
    """The package of ``--model``; None without."""
    if arguments.model is None:
        if arguments.output is not None or not arguments.timing:
            raise CommandError("--output and --no-timing are about prediction: say --model MODEL as well")
        return None
    from medmamba.inference.model import ModelRefused, load_model

    try:
        model = load_model(arguments.model)
    except ModelRefused as error:
        raise CommandError(str(error)) from error
    names = model.channel_names
    if arguments.channels not in (None, len(names)):
        raise CommandError(f"the model has {len(names)} channels ({', '.join(names)}); leave --channels out")
    if model.fingerprint is None:
        print("the model does not say what it was trained on: nothing is compared with that", file=sys.stderr)
    return model


def _reading(arguments: argparse.Namespace, model: Model | None) -> Reading:
    from medmamba.inference.check import Reading
    from medmamba.inference.reading.content import Policy

    policy: Policy | Sequence[Policy] = Policy(is_ct=arguments.ct, force=arguments.force)
    if model:
        from medmamba.inference.check.against_model import policies

        policy = policies(model, is_ct=arguments.ct, force=arguments.force)
    return Reading(policy, arguments.volume, arguments.prefer)


def _checks(arguments: argparse.Namespace, cases: Sequence[Case], model: Model | None) -> Sequence[Check]:
    checks: list[Check] = []
    if arguments.labels:
        checks.append(_label_check(arguments, cases))
    elif arguments.overlays:
        raise CommandError("--overlays is about label maps: say --labels FOLDER as well")
    if model:
        from medmamba.inference.check.against_model import model_checks

        checks += model_checks(model)
    return checks


def _estimate(model: Model, timing: bool) -> Estimate:
    from medmamba.inference.check.estimate import Estimate
    from medmamba.inference.check.trial import trial_of
    from medmamba.inference.predictor.model_predictor import ModelPredictor

    predictor = ModelPredictor(model)
    return Estimate(predictor, trial_of(predictor) if timing else None)


def _cases(folder: Path, channels: int | Sequence[str] | None) -> Sequence[Case]:
    from medmamba.inference.check import find_cases

    if not folder.exists():
        raise CommandError(f"{folder} does not exist; give a folder of images")
    try:
        found = find_cases(folder, channels)
    except OSError as error:
        raise CommandError(f"{folder} cannot be read ({error.strerror or error}); check its rights") from error
    names = ", ".join(map(printable, found.ignored[:_MOST_NAMES])) + ", ..." * (len(found.ignored) > _MOST_NAMES)
    if not found.cases:
        raise CommandError(f"{folder} holds no image ({names or 'nothing at all'}); see docs/how-to/check-images.md")
    if found.ignored:
        print(f"{len(found.ignored)} no image of a format that is read: {names}", file=sys.stderr)
    return found.cases


def _label_check(arguments: argparse.Namespace, cases: Sequence[Case]) -> LabelCheck:
    from medmamba.inference.check import LabelCheck
    from medmamba.inference.check.overlay import Overlays

    labels = {}
    for label in _cases(arguments.labels, 1):
        if label.problem is not None:
            raise CommandError(f"{arguments.labels}: {label.problem.text}")
        labels[label.id] = label.files[0]
    alone = sorted(set(labels) - {case.id for case in cases})
    if alone:
        names = ", ".join(map(printable, alone[:_MOST_NAMES])) + ", ..." * (len(alone) > _MOST_NAMES)
        print(f"{len(alone)} label maps without an image: {names}", file=sys.stderr)
    overlays = None
    if arguments.overlays:
        try:
            arguments.overlays.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"{arguments.overlays} cannot be made ({error.strerror}); choose another") from error
        images = {case.id: case.files[0] for case in cases}
        overlays = Overlays(arguments.overlays, images, arguments.volume, arguments.prefer)
    return LabelCheck(labels, arguments.allow_shift, overlays)


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
