"""``medmamba plan --like``: plans and initial weights for a pretrained encoder."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmamba.command import CommandError
from medmamba.nnunet import folders
from medmamba.nnunet.errors import UserFacingError
from medmamba.nnunet.names import FINETUNING, trainer_name
from medmamba.weights import WeightsError
from medmamba_plans.dataset import STOCK_PLANS, Dataset, check_replaceable, write_plans
from medmamba_plans.derive import Request
from medmamba_plans.describe import describe_configurations, describe_schedule
from medmamba_plans.init_file import check_init_replaceable, write_init_file
from medmamba_plans.like import Encoder, derive_like
from medmamba_plans.like_check import CONFIGURATION, check_dataset, check_encoder, check_like
from medmamba_plans.plan_command import SCHEDULE, schedule_of, stock_plans

#: What the encoder decides: argument of the command -> its value when it was not given.
_DECIDED: dict[str, Any] = {
    "preset": None,
    "gpu_gb": None,
    "variant": None,
    "geometry": None,
    "ssm_mode": None,
    "mixer": None,
    "mixer_arguments": [],
    "routes": None,
    "arguments": [],
    "dt_init": "default",
}
_SPELLED = {"arguments": "--set", "mixer_arguments": "--mixer-set"}


def run_like(arguments: argparse.Namespace) -> int:
    """Write plans and the file of initial weights, or with ``--from`` the latter alone."""
    dataset = Dataset.find(arguments.dataset)
    try:
        encoder = Encoder.read(arguments.like)
        _refuse_contradictions(arguments, encoder.description.network)
        check_encoder(encoder.description)
        dataset_json = dataset.dataset_json()
        check_dataset(encoder.description, dataset_json)
        if arguments.source is None:
            _plan(arguments, dataset, encoder, dataset_json)
        else:
            _use_plans(arguments, dataset, encoder, dataset_json)
    except (UserFacingError, WeightsError) as error:
        raise CommandError(str(error)) from error
    for text in encoder.description.citation:
        print(f"cite: {text}")
    return 0


def _plan(arguments: argparse.Namespace, dataset: Dataset, encoder: Encoder, dataset_json: Mapping[str, Any]) -> None:
    if arguments.configurations not in (None, [CONFIGURATION]):
        raise CommandError(f"plans like an encoder have one configuration, {CONFIGURATION}; leave -c out")
    network = encoder.description.network
    request = Request(
        network=network,
        batch_size=arguments.batch_size,
        patch_size=arguments.patch_size,
        schedule=schedule_of(arguments, network),
        name=arguments.plans_name or encoder.default_plans_name,
    )
    path = dataset.plans_path(request.plans_name)
    replaces = check_replaceable(path, network, encoder.origin)
    init = _init_path(arguments, dataset, request.plans_name)
    check_init_replaceable(init, encoder)
    stock = stock_plans(dataset, arguments.num_processes)
    plans = derive_like(stock, encoder, request, dataset_json)
    _write_init(arguments, init, encoder, plans, CONFIGURATION, dataset_json)
    write_plans(path, plans)
    print(f"{'replaced' if replaces else 'wrote'} {path}")
    missing = describe_configurations(plans, dataset.folder)
    finetuning = request.schedule.for_finetuning()
    describe_schedule(request.schedule)
    describe_schedule(finetuning, f"as {trainer_name(network)}{FINETUNING} changes it")
    _print_next(dataset, plans["plans_name"], CONFIGURATION, init, network, is_preprocessed=not missing)


def _use_plans(
    arguments: argparse.Namespace, dataset: Dataset, encoder: Encoder, dataset_json: Mapping[str, Any]
) -> None:
    surplus = [
        name for name in ("plans_name", "batch_size", "patch_size", *SCHEDULE) if getattr(arguments, name) is not None
    ]
    if surplus:
        raise CommandError(
            f"the plans {arguments.source} are used as they are; leave {', '.join(map(_option, surplus))} out, or "
            "--from, which makes new plans"
        )
    (configuration,) = arguments.configurations or [CONFIGURATION]
    plans = folders.read_plans(dataset.folder, arguments.source)
    check_like(encoder.description, plans, configuration, dataset_json)
    init = _init_path(arguments, dataset, arguments.source)
    _write_init(arguments, init, encoder, plans, configuration, dataset_json)
    used = {**plans, "configurations": {configuration: folders.configuration_of(plans, configuration)}}
    missing = describe_configurations(used, dataset.folder)
    network = encoder.description.network
    _print_next(dataset, arguments.source, configuration, init, network, is_preprocessed=not missing)


def _refuse_contradictions(arguments: argparse.Namespace, network: str) -> None:
    if arguments.network not in (None, network):
        raise CommandError(
            f"--network {arguments.network} contradicts the encoder, which is of {network}; leave it out"
        )
    given = [name for name, default in _DECIDED.items() if getattr(arguments, name) != default]
    if given:
        raise CommandError(f"the encoder decides its network; leave {', '.join(map(_option, given))} out")
    if arguments.source == STOCK_PLANS:
        raise CommandError(
            f"{STOCK_PLANS} are of another network; leave --from out, and plans like the encoder are made"
        )
    if arguments.configurations is not None and len(arguments.configurations) != 1:
        raise CommandError("the initial weights are for one configuration; give one with -c")


def _option(name: str) -> str:
    return _SPELLED.get(name, f"--{name.replace('_', '-')}")


def _init_path(arguments: argparse.Namespace, dataset: Dataset, plans_name: str) -> Path:
    if arguments.init is None:
        return dataset.folder / f"{plans_name}_init.pth"
    path: Path = arguments.init
    if not path.resolve().parent.is_dir():
        raise CommandError(f"{path.resolve().parent} is not a folder; create it or choose another --init")
    return path


def _write_init(
    arguments: argparse.Namespace,
    path: Path,
    encoder: Encoder,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    replaces = path.exists()
    print(write_init_file(path, encoder, plans, configuration, dataset_json, arguments.seed or 0))
    print(f"{'replaced' if replaces else 'wrote'} {path}")


def _print_next(
    dataset: Dataset, plans_name: str, configuration: str, init: Path, network: str, *, is_preprocessed: bool
) -> None:
    command = f"{dataset.number} {configuration} 0 -p {plans_name} -pretrained_weights {shlex.quote(str(init))}"
    print("next:")
    if not is_preprocessed:
        print(f"  nnUNetv2_preprocess -d {dataset.number} -plans_name {plans_name} -c {configuration}")
    print(f"  medmamba train {command} -tr {trainer_name(network)}{FINETUNING}")
    print(f"  nnUNetv2_train {command}    (stock trainer, nnU-Net's schedule)")
