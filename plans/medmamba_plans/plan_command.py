"""``medmamba plan``: its arguments, and plans for a network. Light; the work is imported when it runs.

Plans for a pretrained encoder (``--like``) are the matter of :mod:`medmamba_plans.like_command`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import CommandError
from medmamba_plans import teaching
from medmamba_plans.dataset import STOCK_PLANS, Dataset, check_replaceable, write_plans

if TYPE_CHECKING:
    from medmamba.nnunet.schedule import Schedule
    from medmamba.nnunet.teacher import ChosenTeacher
    from medmamba_plans.derive import Request

#: Argument of the command -> entry of the schedule.
SCHEDULE = {
    "epochs": "num_epochs",
    "iterations": "num_iterations_per_epoch",
    "val_iterations": "num_val_iterations_per_epoch",
    "optimizer": "optimizer",
    "lr": "initial_lr",
    "lr_decay": "lr_decay",
    "weight_decay": "weight_decay",
    "eps": "eps",
    "warmup_epochs": "warmup_epochs",
    "save_every": "save_every",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or number, e.g. 4")
    parser.add_argument("--network", help="e.g. vmunet; required without --like")
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
    parser.add_argument("--mixer", metavar="NAME", help="blocks of a published mixer in the place of the network's own")
    parser.add_argument(
        "--mixer-set",
        dest="mixer_arguments",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the mixer, e.g. merge=mean; may be repeated",
    )
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
        help=f"plans to start from (default {STOCK_PLANS}; not with --preset and --gpu-gb); with --like: the plans to "
        "use as they are",
    )
    parser.add_argument(
        "--plans-name", help="name of the new plans; default: nnUNetMedMamba<Network>Plans with what was chosen"
    )
    parser.add_argument("--batch-size", type=int, metavar="B")
    parser.add_argument("--patch-size", type=int, nargs="+", metavar="N", help="one number per axis of the plans")
    _configure_encoder(parser.add_argument_group("fine-tuning of a pretrained encoder"))
    _configure_schedule(
        parser.add_argument_group("schedule of our trainers (stored in the plans; the stock trainer ignores it)")
    )
    teaching.configure(parser.add_argument_group("distillation by our trainers (stored in the plans likewise)"))
    parser.add_argument(
        "-np",
        dest="num_processes",
        type=int,
        default=4,
        metavar="N",
        help="processes that read a dataset without plans",
    )


def _configure_encoder(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--like",
        type=Path,
        metavar="ENCODER",
        help="encoder.safetensors of `medmamba pretrain run`: network, spacing, patch and normalisation as in "
        "pretraining, and a file for -pretrained_weights",
    )
    group.add_argument(
        "--init", type=Path, metavar="FILE", help="file for -pretrained_weights; default: <plans>_init.pth beside them"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the decoder's initial values in it (default 0)")


def _configure_schedule(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, metavar="N")
    group.add_argument("--iterations", type=int, metavar="N", help="per epoch")
    group.add_argument("--val-iterations", type=int, metavar="N", help="per epoch")
    group.add_argument("--optimizer", metavar="NAME", help="SGD (default) or AdamW with the settings of the paper")
    group.add_argument("--lr", type=float, metavar="LR", help="initial learning rate")
    group.add_argument("--lr-decay", metavar="NAME", help="poly (default, nnU-Net's) or cosine")
    group.add_argument("--weight-decay", type=float, metavar="W")
    group.add_argument("--eps", type=float, metavar="E", help="of AdamW")
    group.add_argument("--warmup-epochs", type=int, metavar="N")
    group.add_argument("--save-every", type=int, metavar="N", help="epochs between two checkpoint_latest")


def run(arguments: argparse.Namespace) -> int:
    """Write plans."""
    if arguments.like is not None and arguments.teacher is not None:
        raise CommandError("a pretrained encoder and a teacher in the same plans are not supported; leave one out")
    if arguments.like is not None:
        from medmamba_plans.like_command import run_like

        return run_like(arguments)
    if arguments.network is None:
        raise CommandError("name a network, e.g. --network vmunet, or a pretrained encoder, --like FILE")
    if arguments.init is not None or arguments.seed is not None:
        raise CommandError("--init and --seed are for --like; leave them out, or give the encoder with --like FILE")
    return _run_network(arguments)


def _run_network(arguments: argparse.Namespace) -> int:
    from medmamba.nnunet import folders
    from medmamba.nnunet.errors import UserFacingError
    from medmamba_plans.derive import BUDGET, check_options, derive_plans

    dataset = Dataset.find(arguments.dataset)
    try:
        teacher = teaching.chosen_teacher(arguments)
        request = _request(arguments, teacher)
        is_budget = request.budget_gb is not None
        if is_budget and arguments.source is not None:
            raise CommandError("patch and batch for a GPU are planned anew; leave --from out, or --preset and --gpu-gb")
        source = arguments.source or STOCK_PLANS
        path = dataset.plans_path(request.plans_name)
        replaces = check_replaceable(path, request.network, BUDGET if is_budget else source)
        if source == STOCK_PLANS:
            # Reading a dataset without plans takes minutes and writes files: first all that can be wrong without it.
            if not dataset.plans_path(STOCK_PLANS).is_file():
                check_options(request)
            stock = stock_plans(dataset, arguments.num_processes)
        else:
            stock = folders.read_plans(dataset.folder, source)
        if is_budget:
            stock = _plan_for_budget(dataset, request, stock, arguments.num_processes)
        plans = derive_plans(stock, request)
        if teacher is not None:
            teaching.check_student(teacher, plans, dataset.dataset_json(), request.configurations or ())
    except UserFacingError as error:
        raise CommandError(str(error)) from error
    write_plans(path, plans)
    print(f"{'replaced' if replaces else 'wrote'} {path}")
    _describe(plans, request, dataset)
    return 0


def stock_plans(dataset: Dataset, num_processes: int) -> dict[str, Any]:
    """nnU-Net's own plans of a dataset; made now if there are none, which reads all cases."""
    from medmamba.nnunet import folders

    if not dataset.plans_path(STOCK_PLANS).is_file():
        where = dataset.why_no_raw()
        if where:
            raise CommandError(
                f"{dataset.name} has no {STOCK_PLANS} and no raw data to plan from ({where}); export nnUNet_raw, or "
                f"run `nnUNetv2_plan_and_preprocess -d {dataset.number}` where the data are"
            )
        print(f"{dataset.name} has no plans yet: reading its cases and planning with nnU-Net ...", flush=True)
        dataset.create_stock_plans(num_processes)
    return folders.read_plans(dataset.folder, STOCK_PLANS)


def schedule_of(arguments: argparse.Namespace, network: str) -> Schedule:
    """The schedule that the arguments ask for, with the settings of the network's paper for AdamW."""
    from medmamba.networks import NETWORKS
    from medmamba.nnunet.schedule import Schedule

    spec = NETWORKS.get(network)
    entries = {entry: getattr(arguments, name) for name, entry in SCHEDULE.items()}
    return Schedule.create(adamw=spec.adamw if spec else None, **entries)


def _request(arguments: argparse.Namespace, teacher: ChosenTeacher | None = None) -> Request:
    from medmamba_plans.derive import Request

    options: dict[str, Any] = {"geometry": arguments.geometry, "ssm_mode": arguments.ssm_mode}
    if arguments.arguments and arguments.plans_name is None:
        raise CommandError("--set makes an experiment of its own; name its plans with --plans-name")
    options |= dict(_argument(text) for text in arguments.arguments)
    options["mixer"] = _mixer(arguments)
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
        schedule=schedule_of(arguments, arguments.network),
        configurations=arguments.configurations or (None if teacher is None else [teacher.configuration]),
        name=arguments.plans_name,
        distillation=None if teacher is None else teacher.distillation,
    )


def _mixer(arguments: argparse.Namespace) -> str | dict[str, Any] | None:
    """The mixer and its options as a network takes them."""
    if not arguments.mixer_arguments:
        mixer: str | None = arguments.mixer
        return mixer
    if arguments.mixer is None:
        raise CommandError("--mixer-set changes a mixer; name it with --mixer")
    given = (_argument(text, "--mixer-set", "merge=mean") for text in arguments.mixer_arguments)
    return {"name": arguments.mixer, **dict(given)}


def _argument(text: str, option: str = "--set", example: str = "d_state=8") -> tuple[str, Any]:
    """``NAME=VALUE`` of an option; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise CommandError(f"{option} {text} is not NAME=VALUE, e.g. {option} {example}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _plan_for_budget(dataset: Dataset, request: Request, stock: dict[str, Any], num_processes: int) -> dict[str, Any]:
    from medmamba_plans.derive import check_options
    from medmamba_plans.planner import plan_for_budget
    from medmamba_plans.stock import extract_fingerprint

    where = dataset.why_no_raw()
    if where:
        raise CommandError(
            f"nnU-Net plans patch and batch from the raw dataset ({where}); export nnUNet_raw, or leave --preset and "
            "--gpu-gb out"
        )
    check_options(request)
    if not (dataset.folder / "dataset_fingerprint.json").is_file():
        print(f"{dataset.name} has no fingerprint: reading its cases ...", flush=True)
        extract_fingerprint(dataset.name, num_processes)
    print(f"looking for the largest patch within {request.budget_gb:g} GB ...", flush=True)
    return plan_for_budget(dataset.name, request, stock)


def _describe(plans: dict[str, Any], request: Request, dataset: Dataset) -> None:
    from medmamba.nnunet.names import trainer_name
    from medmamba_plans.describe import describe_configurations, describe_distillation, describe_schedule

    missing = describe_configurations(plans, dataset.folder, request.budget_gb)
    describe_schedule(request.schedule)
    if request.distillation is not None:
        describe_distillation(request.distillation)
    print("next:")
    if missing:
        print(f"  nnUNetv2_preprocess -d {dataset.number} -plans_name {request.plans_name} -c {' '.join(missing)}")
    first = next(
        (name for name in plans["configurations"] if name.startswith("3d_fullres")),
        next(iter(plans["configurations"])),
    )
    command = f"{dataset.number} {first} 0 -p {request.plans_name}"
    print(f"  nnUNetv2_train {command}    (stock trainer, nnU-Net's schedule)")
    print(f"  medmamba train {command}    ({trainer_name(request.network)}, schedule above)")
