"""The commands ``medmamba plan``, ``calibrate`` and ``collect``. Light; the work is imported when they run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import Command, CommandError

if TYPE_CHECKING:
    from medmamba_plans.derive import Request

STOCK_PLANS = "nnUNetPlans"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or number, e.g. 4")
    parser.add_argument("--network", required=True, help="e.g. vmunet")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--preset",
        metavar="NAME",
        help="M, L or XL: patch and batch for a GPU of 8, 24 or 40 GB, as nnU-Net's ResEnc presets; default: as in the "
        "stock plans",
    )
    budget.add_argument("--gpu-gb", type=float, metavar="G", help="patch and batch for a GPU of G GB")
    parser.add_argument("--variant", metavar="NAME", help="named set of arguments of the network, e.g. small")
    parser.add_argument("--geometry", help="native (nnU-Net's stages; default) or faithful (the published shape)")
    parser.add_argument("--ssm-mode", help="scan (default), or a control such as identity")
    parser.add_argument("--routes", nargs="+", metavar="ROUTE", help="a route set, or routes, in place of the default")
    parser.add_argument(
        "--set",
        dest="arguments",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the network, e.g. d_state=8 or expand_norm=batch; may be repeated",
    )
    parser.add_argument(
        "--dt-init",
        choices=["default", "route"],
        metavar="RULE",
        default="default",
        help="step sizes of the scans at initialisation: default (Mamba's) or route (from its length and spacing)",
    )
    parser.add_argument(
        "-c",
        dest="configurations",
        nargs="+",
        metavar="CONFIG",
        help="configurations, e.g. 3d_fullres; default: all",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PLANS",
        help=f"plans to start from (default {STOCK_PLANS}; not with --preset and --gpu-gb)",
    )
    parser.add_argument("--plans-name", help="name of the new plans; default: nnUNetMedMamba<Network>Plans")
    parser.add_argument("--batch-size", type=int, metavar="B")
    parser.add_argument("--patch-size", type=int, nargs="+", metavar="N", help="one number per axis of the plans")
    training = parser.add_argument_group("schedule of our trainers (stored in the plans; the stock trainer ignores it)")
    training.add_argument("--epochs", type=int, metavar="N")
    training.add_argument("--iterations", type=int, metavar="N", help="per epoch")
    training.add_argument("--val-iterations", type=int, metavar="N", help="per epoch")
    training.add_argument("--optimizer", metavar="NAME", help="SGD (default) or AdamW with the settings of the paper")
    training.add_argument("--lr", type=float, metavar="LR", help="initial learning rate")
    training.add_argument("--lr-decay", metavar="NAME", help="poly (default, nnU-Net's) or cosine")
    training.add_argument("--weight-decay", type=float, metavar="W")
    training.add_argument("--eps", type=float, metavar="E", help="of AdamW")
    training.add_argument("--warmup-epochs", type=int, metavar="N")
    training.add_argument("--save-every", type=int, metavar="N", help="epochs between two checkpoint_latest")
    parser.add_argument(
        "-np",
        dest="num_processes",
        type=int,
        default=4,
        metavar="N",
        help="processes that read a dataset without plans",
    )


def _run(arguments: argparse.Namespace) -> int:
    from medmamba.files import write_json
    from medmamba.nnunet import folders
    from medmamba.nnunet.errors import UserFacingError
    from medmamba_plans.derive import BUDGET, check_options, derive_plans

    preprocessed = folders.folder("nnUNet_preprocessed")
    raw = folders.folder_or_none("nnUNet_raw")
    dataset = folders.find_dataset(arguments.dataset, [preprocessed, *([raw] if raw else [])])
    target = preprocessed / dataset
    try:
        request = _request(arguments)
        is_budget = request.budget_gb is not None
        if is_budget and arguments.source is not None:
            raise CommandError("patch and batch for a GPU are planned anew; leave --from out, or --preset and --gpu-gb")
        source = arguments.source or STOCK_PLANS
        path = target / f"{request.plans_name}.json"
        replaces = _check_replaceable(path, request.network, BUDGET if is_budget else source)
        if source == STOCK_PLANS and not (target / f"{STOCK_PLANS}.json").is_file():
            # Reading a dataset takes minutes and writes files: first all that can be wrong without it.
            check_options(request)
            _create_stock_plans(dataset, raw, arguments.num_processes)
        stock = folders.read_plans(target, source)
        if is_budget:
            stock = _plan_for_budget(dataset, raw, request, stock, arguments.num_processes)
        plans = derive_plans(stock, request)
    except UserFacingError as error:
        raise CommandError(str(error)) from error
    try:
        write_json(path, plans)
    except OSError as error:
        raise CommandError(f"{path} cannot be written ({error.strerror}); make the folder writable") from error
    print(f"{'replaced' if replaces else 'wrote'} {path}")
    _describe(plans, request, int(dataset[7:10]), target)
    return 0


def _request(arguments: argparse.Namespace) -> Request:
    from medmamba.networks import NETWORKS
    from medmamba.nnunet.schedule import Schedule
    from medmamba_plans.derive import Request

    paper = NETWORKS.get(arguments.network)
    options: dict[str, Any] = {"geometry": arguments.geometry, "ssm_mode": arguments.ssm_mode}
    if arguments.arguments and arguments.plans_name is None:
        raise CommandError("--set makes an experiment of its own; name its plans with --plans-name")
    options |= dict(_argument(text) for text in arguments.arguments)
    if arguments.routes is not None:
        options["routes"] = arguments.routes[0] if len(arguments.routes) == 1 else arguments.routes
    return Request(
        network=arguments.network,
        variant=arguments.variant,
        preset=arguments.preset,
        gpu_gb=arguments.gpu_gb,
        options={name: value for name, value in options.items() if value is not None},
        dt_init=arguments.dt_init,
        batch_size=arguments.batch_size,
        patch_size=arguments.patch_size,
        schedule=Schedule.create(
            adamw=paper.adamw if paper else None,
            num_epochs=arguments.epochs,
            num_iterations_per_epoch=arguments.iterations,
            num_val_iterations_per_epoch=arguments.val_iterations,
            optimizer=arguments.optimizer,
            initial_lr=arguments.lr,
            lr_decay=arguments.lr_decay,
            weight_decay=arguments.weight_decay,
            eps=arguments.eps,
            warmup_epochs=arguments.warmup_epochs,
            save_every=arguments.save_every,
        ),
        configurations=arguments.configurations,
        name=arguments.plans_name,
    )


def _argument(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` of ``--set``; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise CommandError(f"--set {text} is not NAME=VALUE, e.g. --set d_state=8")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _why_no_raw(dataset: str, raw: Path | None) -> str | None:
    """Why the raw dataset cannot be read; None if it can."""
    if raw is None:
        return "nnUNet_raw is not set or not a folder"
    return None if (raw / dataset / "dataset.json").is_file() else f"{raw / dataset} has no dataset.json"


def _create_stock_plans(dataset: str, raw: Path | None, num_processes: int) -> None:
    from medmamba_plans.stock import plan_with_nnunet

    where = _why_no_raw(dataset, raw)
    if where:
        raise CommandError(
            f"{dataset} has no {STOCK_PLANS} and no raw data to plan from ({where}); export nnUNet_raw, or run "
            f"`nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])}` where the data are"
        )
    print(f"{dataset} has no plans yet: reading its cases and planning with nnU-Net ...", flush=True)
    plan_with_nnunet(dataset, num_processes)


def _plan_for_budget(
    dataset: str, raw: Path | None, request: Request, stock: dict[str, Any], num_processes: int
) -> dict[str, Any]:
    from medmamba.nnunet import folders
    from medmamba_plans.derive import check_options
    from medmamba_plans.planner import plan_for_budget
    from medmamba_plans.stock import extract_fingerprint

    where = _why_no_raw(dataset, raw)
    if where:
        raise CommandError(
            f"nnU-Net plans patch and batch from the raw dataset ({where}); export nnUNet_raw, or leave --preset and "
            "--gpu-gb out"
        )
    check_options(request)
    if not (folders.folder("nnUNet_preprocessed") / dataset / "dataset_fingerprint.json").is_file():
        print(f"{dataset} has no fingerprint: reading its cases ...", flush=True)
        extract_fingerprint(dataset, num_processes)
    print(f"looking for the largest patch within {request.budget_gb:g} GB ...", flush=True)
    return plan_for_budget(dataset, request, stock)


def _check_replaceable(path: Path, network: str, source: str) -> bool:
    """Whether there are plans of this name; only ours, for the same network and from the same plans, are replaced."""
    from medmamba.nnunet import folders

    if not path.exists():
        return False
    plans = folders.read_json(path)
    owner = plans.get("medmamba", {}) if isinstance(plans, dict) else {}
    if (owner.get("network"), owner.get("derived_from")) != (network, source):
        origin = f"the network {owner['network']} from {owner['derived_from']}" if owner else "something else"
        raise CommandError(f"{path} was made for {origin}; choose another --plans-name")
    return True


def _describe(plans: dict[str, Any], request: Request, number: int, target: Path) -> None:
    from medmamba.nnunet import folders
    from medmamba.nnunet.names import trainer_name

    missing = []
    peaks = _predicted_gb(plans, target)
    for name in plans["configurations"]:
        configuration = folders.configuration_of(plans, name)
        shape = "x".join(map(str, configuration["patch_size"]))
        memory = f", {peaks[name]:.1f} GB" if name in peaks else ""
        print(
            f"  {name}: patch {shape}, batch {configuration['batch_size']}{memory}, "
            f"data {configuration['data_identifier']}"
        )
        if (
            "inherits_from" not in plans["configurations"][name]
            and not (target / configuration["data_identifier"]).is_dir()
        ):
            missing.append(name)
    if peaks:
        _describe_memory(peaks, request.budget_gb)
    schedule = request.schedule
    print(
        f"  schedule: {schedule.num_epochs} epochs of {schedule.num_iterations_per_epoch} iterations, "
        f"{schedule.optimizer}, learning rate {schedule.initial_lr:g}"
    )
    print("next:")
    if missing:
        print(f"  nnUNetv2_preprocess -d {number} -plans_name {request.plans_name} -c {' '.join(missing)}")
    first = next(
        (name for name in plans["configurations"] if name.startswith("3d_fullres")),
        next(iter(plans["configurations"])),
    )
    print(f"  nnUNetv2_train {number} {first} 0 -p {request.plans_name}    (stock trainer, nnU-Net's schedule)")
    print(
        f"  medmamba train {number} {first} 0 -p {request.plans_name}    ({trainer_name(request.network)}, "
        "schedule above)"
    )


def _predicted_gb(plans: dict[str, Any], target: Path) -> dict[str, float]:
    """Predicted peak of every configuration; nothing where dataset.json, and so channels and classes, are missing."""
    from medmamba.diagnostics import GB
    from medmamba.nnunet import folders
    from medmamba_plans.planner import predicted_peak

    dataset_json = folders.read_dataset_json_beside(target / f"{plans['plans_name']}.json")
    if dataset_json is None:
        return {}
    return {name: predicted_peak(plans, name, dataset_json) / GB for name in plans["configurations"]}


def _describe_memory(peaks: dict[str, float], budget_gb: float | None) -> None:
    from medmamba.diagnostics import MemoryModel

    model = MemoryModel.load("cuda")
    print(
        "  GB: predicted peak of a training in bfloat16 with SGD, the context of the GPU included"
        + ("" if model.is_calibrated else "; an UNCALIBRATED estimate, not yet compared with a GPU")
    )
    above = [name for name, peak in peaks.items() if budget_gb is not None and peak > budget_gb]
    if above:
        print(f"  above {budget_gb:g} GB: {', '.join(above)} (the patch or batch that you asked for)")


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
    configure=_configure,
    run=_run,
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
