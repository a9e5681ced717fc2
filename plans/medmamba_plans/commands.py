"""The commands ``medmamba plan``, ``calibrate`` and ``collect``. Light; the work is imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from medmamba.command import Command, CommandError
from medmamba_plans import plan_command

_DEVICE_HELP = "cpu or cuda: where to train; default: cuda if there is a GPU"


def _configure_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], metavar="NAME", help=_DEVICE_HELP)
    parser.add_argument("--compile", action="store_true", help="train through torch.compile, as nnU-Net does on GPUs")
    parser.add_argument("--case", metavar="TEXT", help="only trainings whose name contains this")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write the measurements")
    parser.add_argument("--csv", type=Path, metavar="CSV", help="fit to these measurements instead of new ones")
    parser.add_argument("--fit", action="store_true", help="write the coefficients that `medmamba plan` uses")


def _calibrate(arguments: argparse.Namespace) -> int:
    import torch

    from medmamba.diagnostics.memory import MODEL_FILE
    from medmamba.files import write_json
    from medmamba.nnunet.folders import read_json
    from medmamba_plans import calibrate

    if arguments.out is not None and not arguments.out.resolve().parent.is_dir():
        raise CommandError(f"{arguments.out.resolve().parent} is not a folder; create it or choose another --out")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.csv is None and device == "cuda" and not torch.cuda.is_available():
        raise CommandError("torch sees no CUDA device; give --device cpu, or --csv with measurements of a GPU")
    if arguments.csv is None:
        rows, facts = _measured(calibrate, arguments, device)
    else:
        rows = calibrate.read(arguments.csv)
        facts = rows[0]
        device = facts["device"]
    name = device + ("-compiled" if int(rows[0]["is_compiled"]) else "")
    source = f"{len(rows)} trainings, {facts['processor']}, torch {facts['torch']}, medmamba {facts['medmamba']}"
    if len(rows) < calibrate.FEWEST:
        print(f"too few measurements to fit the coefficients: {len(rows)}")
        return 0
    found = calibrate.fit(rows, source)
    model, ratios = found.model, found.ratios
    print(
        f"{name}: {model.fixed / calibrate.MIB:.0f} MiB + {model.bytes_per_parameter:g} bytes per parameter + "
        f"{model.factor:g} x counted; measured over predicted {min(ratios):.2f} to {max(ratios):.2f}"
    )
    if arguments.fit:
        try:
            write_json(MODEL_FILE, {**read_json(MODEL_FILE), name: vars(model)})
        except OSError as error:
            raise CommandError(
                f"{MODEL_FILE} cannot be written ({error.strerror}); make the folder writable"
            ) from error
        print(f"wrote {MODEL_FILE}")
    return 0


def _measured(
    calibrate: Any, arguments: argparse.Namespace, device: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    chosen = [case for case in calibrate.cases(device) if arguments.case is None or arguments.case in case.name]
    if not chosen:
        names = ", ".join(case.name for case in calibrate.cases(device))
        raise CommandError(f"no training's name contains {arguments.case!r}; known: {names}")
    facts = calibrate.machine(device)
    rows: list[dict[str, Any]] = []
    print(f"{'training':<44} {'counted MiB':>11} {'peak MiB':>9}")
    for case in chosen:
        try:
            (row,) = calibrate.measure([case], device, arguments.compile)
        except CommandError as error:  # e.g. a GPU that is too small for this one
            print(f"left out: {error}", flush=True)
            continue
        rows.append(row)
        counted = row["batch_size"] * row["live_mib"]
        print(f"{case.name:<44} {counted:>11.0f} {row['peak_mib']:>9.0f}", flush=True)
        if arguments.out is not None:  # after every row: a GPU may be taken away
            calibrate.write(rows, facts, arguments.out)
    if not rows:
        raise CommandError("no training could be measured; the lines above say why", 1)
    if arguments.out is not None:
        print(f"wrote {arguments.out}")
    return rows, facts


def _configure_collect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="of a dataset in nnUNet_results, one per run (e.g. per seed)",
    )
    parser.add_argument("--out", type=Path, metavar="CSV", help="write one row per fold and run")
    parser.add_argument("--paired", type=Path, metavar="CSV", help="write the differences between scan and controls")


def _collect(arguments: argparse.Namespace) -> int:
    from medmamba_plans import results

    found = results.find_results(arguments.folders)
    rows = results.rows(found)
    print(f"{'arm':<24} {'run':<10} {'fold':>4} {'parameters':>11} {'cases':>5} {'Dice':>6}  Dice per class")
    for result, row in zip(found, rows, strict=True):
        classes = " ".join(f"{value:.3f}" for value in result.dice_of_classes)
        print(
            f"{result.arm.label:<24} {result.run:<10} {result.fold:>4} {result.parameters:>11,} {row['cases']:>5} "
            f"{row['dice_mean']:>6.3f}  {classes}"
        )
    paired = results.difference_rows(results.differences(found))
    for row in paired:
        print(
            f"{row['first']} - {row['second']}: {row['dice_difference']:+.4f} Dice, 95 % {row['low_95']:+.4f} to "
            f"{row['high_95']:+.4f}, p {row['p_wilcoxon']:g} ({row['cases']} cases, {row['runs']} runs)"
        )
    for path, content in ((arguments.out, rows), (arguments.paired, paired)):
        if path is not None:
            results.write_csv(path, content)
            print(f"wrote {path}")
    return 0


PLAN = Command(
    help="write nnU-Net plans that name one of our networks",
    configure=plan_command.configure,
    run=plan_command.run,
)

CALIBRATE = Command(
    help="measure the memory of trainings and fit the estimate that `medmamba plan` uses",
    configure=_configure_calibrate,
    run=_calibrate,
)

COLLECT = Command(
    help="collect the Dice of trained folders, and compare scans with their controls case by case",
    configure=_configure_collect,
    run=_collect,
)
