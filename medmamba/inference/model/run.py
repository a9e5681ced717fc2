"""A trained folder of nnU-Net, ``DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION``, read without running pickled code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from medmamba.weights import WeightsError, read_training

from .problems import ModelRefused, shown

_SUFFIXES = """
    Adam Adam1en3 Adam3en4 Adan Adan1en1 Adan1en3 Adan3en4 AdanCosAnneal Benchmark_5epochs
    Benchmark_5epochs_noDataLoading CELoss CELoss_5epochs CosAnneal DA5 DA5Segord0 DA5_10epochs DA5ord0
    DiceCELoss_noSmooth DiceLoss DiceTopK10Loss NoDA NoDeepSupervision NoMirroring Topk10Loss Topk10LossLS01
    VanillaAdam VanillaAdam1en3 VanillaAdam3en4 _100epochs _10epochs _1epoch _2000epochs _2000epochs_NoMirroring
    _20epochs _250epochs _250epochs_NoMirroring _4000epochs _4000epochs_NoMirroring _500epochs _50epochs _5epochs
    _750epochs _8000epochs _8000epochs_NoMirroring _DASegOrd0 _DASegOrd0_NoMirroring _noDummy2DDA _onlyMirror01
    _onlyMirror01_1500ep _onlyMirror01_DA5 _onlyMirror01_DASegOrd0 _probabilisticOversampling
    _probabilisticOversampling_010 _probabilisticOversampling_033 _warmup
"""
#: Stock trainers of nnU-Net 2.8 that build the network that the plans name. Others (``nnUNetTrainerBN``, Primus, those
#: of third parties) may build another one with weights of the same names and shapes.
TRAINERS_THAT_FOLLOW_PLANS = frozenset(f"nnUNetTrainer{suffix}" for suffix in ("", *_SUFFIXES.split()))
_WRAPPERS = ("module.", "_orig_mod.")
_FOLD = re.compile(r"fold_(0|[1-9]\d{0,3}|all)", re.ASCII)


@dataclass(frozen=True)
class Run:
    """A trained folder.

    Attributes:
        folder: with plans.json, dataset.json and the folds.
        plans: content of plans.json.
        dataset_json: content of dataset.json.
        fingerprint: content of dataset_fingerprint.json, empty if there is none.
        folds: to be exported, with this checkpoint.
        checkpoint: name of the file in each fold.
    """

    folder: Path
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    fingerprint: dict[str, Any]
    folds: tuple[str, ...]
    checkpoint: str

    def path(self, fold: str) -> Path:
        """Checkpoint of a fold."""
        return self.folder / f"fold_{fold}" / self.checkpoint

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Validation of every fold that has one."""
        paths = {fold: self.folder / f"fold_{fold}" / "validation" / "summary.json" for fold in self.folds}
        return {fold: _json(path) for fold, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class Fold:
    """One checkpoint.

    Attributes:
        weights: of the network, by the key of its state dict.
        trainer: class that trained it.
        trainer_of_network: class that nnU-Net asks to build the network.
        configuration: that was trained.
        plans: of the training; empty if the checkpoint has none.
        dataset_json: of the training; empty if the checkpoint has none.
        mirror_axes: that a prediction may mirror.
        epochs: of the training so far.
        medmamba: version of medmamba in training; None without.
    """

    weights: dict[str, Tensor]
    trainer: str
    trainer_of_network: str
    configuration: str
    plans: Mapping[str, Any]
    dataset_json: Mapping[str, Any]
    mirror_axes: tuple[int, ...] | None
    epochs: int
    medmamba: str | None


def find_run(folder: str | os.PathLike[str], folds: Sequence[str | int] | None, checkpoint: str) -> Run:
    """Read the JSON files of a trained folder and find its checkpoints.

    Args:
        folder: trained folder.
        folds: to be exported; None: all with this checkpoint, and ``all`` only if there is no other.
        checkpoint: name of the file in every fold.

    Raises:
        ModelRefused: MM-MD-030, MM-MD-031.
    """
    folder = Path(folder)
    if not (folder / "plans.json").is_file() or not (folder / "dataset.json").is_file():
        raise ModelRefused(
            "MM-MD-030",
            f"{folder} is no trained folder of nnU-Net: it has no plans.json and dataset.json; give the folder "
            "TRAINER__PLANS__CONFIGURATION in nnUNet_results",
        )
    if Path(checkpoint).name != checkpoint:
        raise ModelRefused(
            "MM-MD-031", f"{shown(checkpoint)} is no file name; give the name of a checkpoint within a fold"
        )
    fingerprint = folder / "dataset_fingerprint.json"
    return Run(
        folder=folder,
        plans=_json(folder / "plans.json"),
        dataset_json=_json(folder / "dataset.json"),
        fingerprint=_json(fingerprint) if fingerprint.is_file() else {},
        folds=_folds(folder, folds, checkpoint),
        checkpoint=checkpoint,
    )


def read_fold(run: Run, fold: str) -> Fold:
    """A checkpoint, without running code from it.

    Raises:
        ModelRefused: MM-MD-032.
    """
    path = run.path(fold)
    try:
        content = read_training(path)
    except WeightsError as error:
        raise ModelRefused("MM-MD-032", str(error)) from error
    arguments, ours = _mapping(content, "init_args"), _mapping(content, "medmamba")
    trainer, axes = content.get("trainer_name"), content.get("inference_allowed_mirroring_axes")
    configuration, epochs = arguments.get("configuration"), content.get("current_epoch")
    is_good = isinstance(trainer, str) and isinstance(configuration, str) and isinstance(epochs, int)
    if not is_good or not (axes is None or _are_axes(axes)):
        raise ModelRefused(
            "MM-MD-032",
            f"{path} lacks what nnU-Net writes beside the weights (trainer_name, init_args, current_epoch, "
            "inference_allowed_mirroring_axes); give a checkpoint that nnU-Net 2 wrote in training",
        )
    version = ours.get("version")
    return Fold(
        weights=_unwrapped(content["network_weights"]),
        trainer=str(ours.get("trainer", trainer)),
        trainer_of_network=str(trainer),
        configuration=str(configuration),
        plans=_mapping(arguments, "plans"),
        dataset_json=_mapping(arguments, "dataset_json"),
        mirror_axes=None if axes is None else tuple(axes),
        epochs=int(epochs or 0),
        medmamba=version if isinstance(version, str) else None,
    )


def _folds(folder: Path, wanted: Sequence[str | int] | None, checkpoint: str) -> tuple[str, ...]:
    present = [match[1] for path in folder.iterdir() if (match := _FOLD.fullmatch(path.name)) and path.is_dir()]
    present.sort(key=lambda fold: (fold == "all", fold.zfill(4)))
    found = [fold for fold in present if (folder / f"fold_{fold}" / checkpoint).is_file()]
    if wanted is None:
        chosen = [fold for fold in found if fold != "all"] or found
    else:
        chosen = list(dict.fromkeys(str(fold) for fold in wanted))
    missing = [fold for fold in chosen if fold not in found]
    if missing or not chosen:
        others = sorted({path.name for path in folder.glob("fold_*/checkpoint_*.pth")} - {checkpoint})
        hint = f"; there is {', '.join(others)} for --checkpoint" if others else ""
        raise ModelRefused(
            "MM-MD-031",
            f"{folder} has no {checkpoint} in {' and '.join(f'fold_{fold}' for fold in missing) or 'any fold'}; finish "
            f"the training{hint}, or choose among the folds that have it: {', '.join(found) or 'none'}",
        )
    return tuple(chosen)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefused("MM-MD-030", f"{path} cannot be read ({shown(str(error))}); restore it") from error
    if not isinstance(content, dict):
        raise ModelRefused("MM-MD-030", f"{path} holds a {type(content).__name__} and no mapping; restore it")
    return content


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _are_axes(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(axis, int) for axis in value)


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel and torch.compile put in front of all of them."""
    named = {str(key): tensor for key, tensor in weights.items()}
    for wrapper in _WRAPPERS:
        if all(key.startswith(wrapper) for key in named):
            named = {key.removeprefix(wrapper): tensor for key, tensor in named.items()}
    return named
