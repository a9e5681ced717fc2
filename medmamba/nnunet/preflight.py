"""What ``medmamba train`` and ``medmamba predict`` check before nnU-Net starts, and the ``-tr`` they fill in.

nnU-Net meets most of these mistakes after ten seconds of imports, with a traceback. Arguments that cannot be
read here are left to nnU-Net's own parser.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmamba.command import CommandError
from medmamba.nnunet import folders
from medmamba.nnunet.names import TRAINER_VARIANTS, trainer_name

logger = logging.getLogger(__name__)


def check_training(arguments: Sequence[str]) -> list[str]:
    """Arguments for ``nnUNetv2_train``, with ``-tr`` filled in when the plans name a network of ours.

    Raises:
        CommandError: variables, dataset, plans, configuration, data or device are not there or do not fit.
    """
    parser = _Parser()
    for positional in ("dataset", "configuration", "fold"):
        parser.add_argument(positional)
    parser.add_argument("-tr")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-pretrained_weights")
    parser.add_argument("-num_gpus")
    parser.add_argument("-device", default="cuda")
    options = parser.read(arguments)
    if options is None:
        return list(arguments)

    preprocessed = folders.folder("nnUNet_preprocessed")
    folders.folder("nnUNet_results")
    raw = folders.folder_or_none("nnUNet_raw")
    dataset = folders.find_dataset(options.dataset, [preprocessed, *([raw] if raw else [])])
    if not (preprocessed / dataset).is_dir():
        raise CommandError(
            f"{dataset} is not preprocessed; run `nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])}` first"
        )
    plans = folders.read_plans(preprocessed / dataset, options.p)
    configuration = folders.configuration_of(plans, options.configuration)
    if not (options.fold == "all" or options.fold.isdigit()):
        raise CommandError(f"fold {options.fold!r} is neither a number nor 'all'")
    if options.pretrained_weights and not Path(options.pretrained_weights).is_file():
        raise CommandError(f"-pretrained_weights {options.pretrained_weights} is not a file")
    _check_device(options.device)
    network = _network_that_fits(configuration)
    data = preprocessed / dataset / configuration["data_identifier"]
    if not data.is_dir() or not any(data.iterdir()):
        raise CommandError(
            f"{data} holds no preprocessed data; run `nnUNetv2_preprocess -d {int(dataset[7:10])} -plans_name "
            f"{options.p} -c {options.configuration}`"
        )
    if options.tr is None and network is not None and trainer_name(network) in TRAINER_VARIANTS:
        logger.warning("-tr %s, because the plans name the network %s", trainer_name(network), network)
        return [*arguments, "-tr", trainer_name(network)]
    return list(arguments)


def check_prediction(arguments: Sequence[str]) -> list[str]:
    """Arguments for ``nnUNetv2_predict``, with ``-tr`` filled in when only one trainer fits the plans.

    Raises:
        CommandError: variables, dataset, trained model, folds, input or device are not there.
    """
    parser = _Parser()
    for required in ("-d", "-c", "-i", "-o"):
        parser.add_argument(required, required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-tr")
    parser.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"])
    parser.add_argument("-chk", default="checkpoint_final.pth")
    parser.add_argument("-device", default="cuda")
    options = parser.read(arguments)
    if options is None:
        return list(arguments)

    results = folders.folder("nnUNet_results")
    dataset = folders.find_dataset(options.d, [results])
    if not Path(options.i).is_dir():
        raise CommandError(
            f"-i {options.i} is not a folder; it holds the images, named CASE_0000 and so on per channel"
        )
    trained = sorted(path.name for path in (results / dataset).glob("*__*__*") if path.is_dir())
    fitting = [name for name in trained if name.split("__")[1:] == [options.p, options.c]]
    if options.tr is not None:
        fitting = [name for name in fitting if name.split("__")[0] == options.tr]
    if not fitting:
        wanted = f"{options.tr or 'any trainer'}, plans {options.p}, configuration {options.c}"
        there = f"there are {', '.join(trained)}" if trained else "nothing has been trained yet"
        raise CommandError(f"no trained model for {wanted} in {results / dataset}; {there}")
    if len(fitting) > 1:
        trainers = " or ".join(name.split("__")[0] for name in fitting)
        raise CommandError(
            f"plans {options.p}, configuration {options.c} were trained by several trainers; add -tr {trainers}"
        )
    _check_folds(results / dataset / fitting[0], options.f, options.chk)
    _check_device(options.device)
    return list(arguments) if options.tr is not None else [*arguments, "-tr", fitting[0].split("__")[0]]


class _Parser(argparse.ArgumentParser):
    """A parser that leaves help and mistakes to nnU-Net's own."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        if {"-h", "--help"} & set(arguments):
            return None
        try:
            return self.parse_known_args(arguments)[0]
        except _UnreadableError:
            return None

    def error(self, message: str) -> Any:
        raise _UnreadableError(message)


class _UnreadableError(Exception):
    pass


def _network_that_fits(configuration: dict[str, Any]) -> str | None:
    from medmamba.nnunet.architecture import ArchitectureError, check_patch, network_of

    try:
        network = network_of(configuration["architecture"])
        if network is not None:
            check_patch(configuration["patch_size"], configuration["architecture"]["arch_kwargs"]["strides"])
    except ArchitectureError as error:
        raise CommandError(str(error)) from error
    return network


def _check_folds(model: Path, folds: Sequence[str], checkpoint: str) -> None:
    there = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{checkpoint}"))
    missing = [fold for fold in folds if fold not in there]
    if missing:
        remedy = (
            f"add -f {' '.join(there)}"
            if there
            else f"finish a training, or choose another checkpoint with -chk, in {model}"
        )
        raise CommandError(f"no {checkpoint} for fold {', '.join(missing)} of {model.name}; {remedy}")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("this torch finds no CUDA device (nnU-Net's default); add -device cpu")
