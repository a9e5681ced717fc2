"""The command ``medmamba plan``. Light; the work is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import Command, CommandError

if TYPE_CHECKING:
    from medmamba_plans.derive import Request

STOCK_PLANS = "nnUNetPlans"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or number, e.g. 4")
    parser.add_argument("--network", required=True, help="e.g. vmunet")
    parser.add_argument("--preset", help="named set of arguments of the network, e.g. small")
    parser.add_argument("--geometry", help="native (nnU-Net's stages; default) or faithful (the published shape)")
    parser.add_argument("--ssm-mode", help="scan (default), or a control such as identity")
    parser.add_argument("--routes", nargs="+", metavar="ROUTE", help="a route set, or routes, in place of the default")
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
        default=STOCK_PLANS,
        metavar="PLANS",
        help="plans to start from (default %(default)s)",
    )
    parser.add_argument("--plans-name", help="name of the new plans; default: nnUNetMedMamba<Network>Plans")
    parser.add_argument("--batch-size", type=int, metavar="B")
    parser.add_argument("--patch-size", type=int, nargs="+", metavar="N", help="one number per axis of the plans")
    training = parser.add_argument_group("schedule of our trainers (stored in the plans; the stock trainer ignores it)")
    training.add_argument("--epochs", type=int, metavar="N")
    training.add_argument("--iterations", type=int, metavar="N", help="per epoch")
    training.add_argument("--val-iterations", type=int, metavar="N", help="per epoch")
    training.add_argument("--optimizer", metavar="NAME", help="SGD (default) or AdamW")
    training.add_argument("--lr", type=float, metavar="LR", help="initial learning rate")
    training.add_argument("--weight-decay", type=float, metavar="W")
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
    from medmamba.nnunet import folders
    from medmamba.nnunet.errors import UserFacingError
    from medmamba.nnunet.files import write_json
    from medmamba_plans.derive import check_options, derive_plans

    preprocessed = folders.folder("nnUNet_preprocessed")
    raw = folders.folder_or_none("nnUNet_raw")
    dataset = folders.find_dataset(arguments.dataset, [preprocessed, *([raw] if raw else [])])
    target = preprocessed / dataset
    try:
        request = _request(arguments)
        path = target / f"{request.plans_name}.json"
        replaces = _check_replaceable(path, request.network, arguments.source)
        if arguments.source == STOCK_PLANS and not (target / f"{STOCK_PLANS}.json").is_file():
            # Reading a dataset takes minutes and writes files: first all that can be wrong without it.
            check_options(request)
            _create_stock_plans(dataset, raw, arguments.num_processes)
        stock = folders.read_plans(target, arguments.source)
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
    from medmamba.nnunet.schedule import Schedule
    from medmamba_plans.derive import Request

    options: dict[str, Any] = {"geometry": arguments.geometry, "ssm_mode": arguments.ssm_mode}
    if arguments.routes is not None:
        options["routes"] = arguments.routes[0] if len(arguments.routes) == 1 else arguments.routes
    return Request(
        network=arguments.network,
        preset=arguments.preset,
        options={name: value for name, value in options.items() if value is not None},
        dt_init=arguments.dt_init,
        batch_size=arguments.batch_size,
        patch_size=arguments.patch_size,
        schedule=Schedule.create(
            num_epochs=arguments.epochs,
            num_iterations_per_epoch=arguments.iterations,
            num_val_iterations_per_epoch=arguments.val_iterations,
            optimizer=arguments.optimizer,
            initial_lr=arguments.lr,
            weight_decay=arguments.weight_decay,
            warmup_epochs=arguments.warmup_epochs,
            save_every=arguments.save_every,
        ),
        configurations=arguments.configurations,
        name=arguments.plans_name,
    )


def _create_stock_plans(dataset: str, raw: Path | None, num_processes: int) -> None:
    from medmamba_plans.stock import plan_with_nnunet

    if raw is None or not (raw / dataset / "dataset.json").is_file():
        where = "nnUNet_raw is not set or not a folder" if raw is None else f"{raw / dataset} has no dataset.json"
        raise CommandError(
            f"{dataset} has no {STOCK_PLANS} and no raw data to plan from ({where}); export nnUNet_raw, or run "
            f"`nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])}` where the data are"
        )
    print(f"{dataset} has no plans yet: reading its cases and planning with nnU-Net ...", flush=True)
    plan_with_nnunet(dataset, num_processes)


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
    for name in plans["configurations"]:
        configuration = folders.configuration_of(plans, name)
        shape = "x".join(map(str, configuration["patch_size"]))
        print(f"  {name}: patch {shape}, batch {configuration['batch_size']}, data {configuration['data_identifier']}")
        if (
            "inherits_from" not in plans["configurations"][name]
            and not (target / configuration["data_identifier"]).is_dir()
        ):
            missing.append(name)
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


PLAN = Command(
    help="write nnU-Net plans that name one of our networks",
    configure=_configure,
    run=_run,
)
