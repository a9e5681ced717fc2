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
    parser.add_argument("-num_gpus", type=int, default=1)
    parser.add_argument("-device", default="cuda")
    options = parser.read(arguments)
    if options is None:
        return list(arguments)

    preprocessed = folders.folder("nnUNet_preprocessed")
    results = folders.folder("nnUNet_results")
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
    _check_gpus(options.num_gpus, options.device, configuration["batch_size"])
    network = _network_that_fits(configuration)
    data = preprocessed / dataset / configuration["data_identifier"]
    if not data.is_dir() or not any(data.iterdir()):
        raise CommandError(
            f"{data} holds no preprocessed data; run `nnUNetv2_preprocess -d {int(dataset[7:10])} -plans_name "
            f"{options.p} -c {options.configuration}`"
        )
    trainer = options.tr or "nnUNetTrainer"
    added: list[str] = []
    if options.tr is None and network is not None and trainer_name(network) in TRAINER_VARIANTS:
        trainer = trainer_name(network)
        logger.warning("-tr %s, because the plans name the network %s", trainer, network)
        added = ["-tr", trainer]
    if configuration.get("previous_stage"):
        stage = f"{trainer}__{options.p}__{configuration['previous_stage']}"
        cases = _cases_of_fold(preprocessed / dataset, data, options.fold)
        _check_previous_stage(results / dataset / stage, options.configuration, cases)
    return [*arguments, *added]


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
    parser.add_argument("-prev_stage_predictions")
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
    _check_first_stage(results / dataset / fitting[0], options.c, options.prev_stage_predictions)
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


def _check_previous_stage(model: Path, configuration: str, cases: set[str]) -> None:
    """The second stage of a cascade trains on what the first predicted for every case, in the fold that holds it."""
    predicted = model / "predicted_next_stage" / configuration
    missing = sorted(cases - {path.stem for path in predicted.glob("*.*")})
    if missing:
        trainer, _, stage = model.name.split("__")
        raise CommandError(
            f"{configuration} reads what {stage} predicted, and {predicted} lacks {len(missing)} of {len(cases)} cases "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); train {stage} with -tr {trainer} first, "
            "every fold or fold all, and do not skip its validation"
        )


def _cases_of_fold(dataset: Path, data: Path, fold: str) -> set[str]:
    splits = dataset / "splits_final.json"
    if fold != "all" and splits.is_file():
        content = folders.read_json(splits)
        if int(fold) < len(content):
            return {*content[int(fold)]["train"], *content[int(fold)]["val"]}
    return {path.stem for path in data.glob("*.pkl")}


def _check_first_stage(model: Path, configuration: str, predictions: str | None) -> None:
    if not (model / "plans.json").is_file():
        return
    previous = folders.configuration_of(folders.read_json(model / "plans.json"), configuration).get("previous_stage")
    if previous is None:
        return
    if predictions is None:
        raise CommandError(
            f"{configuration} reads the segmentations of {previous}; predict the images with -c {previous} first and "
            "name that folder with -prev_stage_predictions"
        )
    if not Path(predictions).is_dir():
        raise CommandError(f"-prev_stage_predictions {predictions} is not a folder; it holds what {previous} predicted")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("this torch finds no CUDA device (nnU-Net's default); add -device cpu")


def _check_gpus(number: int, device: str, batch_size: int) -> None:
    import torch

    if number <= 1:
        return
    if device != "cuda":
        raise CommandError(f"-num_gpus {number} needs CUDA devices, and -device is {device}; leave one of the two out")
    if torch.cuda.device_count() < number:
        raise CommandError(
            f"-num_gpus {number}, and this torch finds {torch.cuda.device_count()}; choose with CUDA_VISIBLE_DEVICES "
            "which it may use, or lower -num_gpus"
        )
    if batch_size < number:
        raise CommandError(
            f"-num_gpus {number} shares out a batch of {batch_size}, so a GPU would have nothing; lower -num_gpus, or "
            f"plan a larger batch (--batch-size {number})"
        )
