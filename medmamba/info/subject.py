"""The network that ``medmamba info`` is asked about, built: from a name, a plans file, a checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.command import CommandError
from medmamba.networks import create_network, get_spec
from medmamba.networks.spec import USUAL_PATCH, USUAL_STRIDES
from medmamba.nnunet import folders
from medmamba.nnunet.architecture import ArchitectureError, architecture_block, check_patch, network_ends, network_of

_SEED = 0


@dataclass(frozen=True)
class Wish:
    """What the user said; None where nothing was said. See ``medmamba info --help``."""

    network: str | None = None
    plans: Path | None = None
    configuration: str | None = None
    checkpoint: Path | None = None
    routes: Sequence[str] | None = None
    dt_init: str | None = None
    input_channels: int | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class Subject:
    """A network with its weights and the patch at which it is looked at.

    Attributes:
        name: registry name.
        network: the module, on the CPU.
        input_channels: image channels.
        num_classes: classes including background.
        patch_size: voxels per axis of the plan.
        spacing: mm per axis of the plan, or None when there is no plan.
        weights: where they come from, in words.
    """

    name: str
    network: nn.Module
    input_channels: int
    num_classes: int
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...] | None
    weights: str


@dataclass(frozen=True)
class _Checkpoint:
    """Weights, and what nnU-Net stores with them: the arguments of its trainer (plans, configuration, dataset.json)."""

    weights: Mapping[str, Tensor]
    init_args: Mapping[str, Any]


def find_subject(wish: Wish) -> Subject:
    """Build the network; its initial weights are drawn with seed 0.

    Raises:
        CommandError: files that are missing or not what they should be, plans of another network, weights that do not
            fit; the text says what to do.
    """
    if wish.checkpoint is not None and wish.dt_init is not None:
        raise CommandError("--dt-init is about initial weights and a checkpoint brings its own; leave one of them out")
    checkpoint = None if wish.checkpoint is None else _read_checkpoint(wish.checkpoint)
    plans, dataset, default = _plans_of(wish, checkpoint)
    configuration = _configuration(plans, wish.configuration or default)
    name = _network_name(wish.network, configuration)
    block = configuration["architecture"]
    try:
        arguments = dict(block if network_of(block) else architecture_block(name, block))["arch_kwargs"]
        patch = tuple(configuration["patch_size"])
        check_patch(patch, arguments["strides"])
    except ArchitectureError as error:
        raise CommandError(str(error)) from error
    spacing = configuration.get("spacing")
    if wish.routes is not None:
        arguments = {**arguments, "routes": wish.routes[0] if len(wish.routes) == 1 else list(wish.routes)}
    if wish.dt_init is not None:
        rule = {"patch_size": list(patch), **({} if spacing is None else {"spacing": list(spacing)})}
        arguments = {**arguments, "dt_init": rule if wish.dt_init == "route" else None}
    channels, classes = _ends(wish, plans, configuration, dataset)
    torch.manual_seed(_SEED)
    try:
        network = create_network(name, channels, classes, **arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(str(error.args[0]) if error.args else str(error)) from error
    if checkpoint is not None:
        _load(network, checkpoint.weights, wish.checkpoint)
    return Subject(
        name=name,
        network=network,
        input_channels=channels,
        num_classes=classes,
        patch_size=patch,
        spacing=None if spacing is None else tuple(spacing),
        weights=f"initial (seed {_SEED})" if wish.checkpoint is None else str(wish.checkpoint),
    )


def _plans_of(
    wish: Wish, checkpoint: _Checkpoint | None
) -> tuple[dict[str, Any], Mapping[str, Any] | None, str | None]:
    """Plans, dataset.json if there is one, and the configuration to take if none is named."""
    if wish.plans is not None:
        return folders.read_plans_file(wish.plans), folders.read_dataset_json_beside(wish.plans), None
    if checkpoint is not None and "plans" in checkpoint.init_args:
        arguments = checkpoint.init_args
        return arguments["plans"], arguments.get("dataset_json"), arguments.get("configuration")
    architecture = {"network_class_name": "none", "arch_kwargs": {"strides": [list(s) for s in USUAL_STRIDES]}}
    usual = {"patch_size": list(USUAL_PATCH), "architecture": architecture}
    return {"plans_name": "none", "configurations": {"usual": usual}}, None, None


def _configuration(plans: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    names = list(plans["configurations"])
    if name is None:
        name = "3d_fullres" if "3d_fullres" in names else names[0]
    configuration = folders.configuration_of(plans, name)
    if "architecture" not in configuration or "patch_size" not in configuration:
        raise CommandError(
            f"configuration {name} has no architecture block or no patch size; plan it again with nnunetv2 2.8 or newer"
        )
    return configuration


def _network_name(wanted: str | None, configuration: Mapping[str, Any]) -> str:
    try:
        named = network_of(configuration["architecture"])
    except ArchitectureError as error:
        raise CommandError(str(error)) from error
    name = wanted or named
    if name is None:
        raise CommandError("name a network, e.g. `medmamba info vmunet`, or give plans that name one of ours")
    if named is not None and wanted not in (None, named):
        raise CommandError(f"the plans name the network {named}, not {wanted}; leave the name out or give other plans")
    try:
        get_spec(name)
    except KeyError as error:
        raise CommandError(error.args[0]) from error
    return name


def _ends(
    wish: Wish, plans: dict[str, Any], configuration: Mapping[str, Any], dataset: Mapping[str, Any] | None
) -> tuple[int, int]:
    """Input channels and classes: as asked, as nnU-Net reads them from dataset.json, or 1 and 2."""
    channels, classes = wish.input_channels, wish.num_classes
    if dataset is not None and (channels is None or classes is None):
        planned, heads = network_ends(plans, configuration, dataset)
        channels, classes = channels or planned, classes or heads
    chosen = (1 if channels is None else channels, 2 if classes is None else classes)
    if min(chosen) < 1:
        raise CommandError(f"--input-channels and --num-classes must be 1 or more, not {chosen[0]} and {chosen[1]}")
    return chosen


def _read_checkpoint(path: Path) -> _Checkpoint:
    """A checkpoint of nnU-Net (``network_weights``) or a state dict. No pickled code is run."""
    import numpy as np

    # nnU-Net logs numpy scalars next to the weights; nothing else than tensors and plain values is let in.
    scalar: Any = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [
        scalar,
        np.dtype,
        *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CommandError(f"{path} is missing") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(
            f"{path} cannot be read as weights ({reason}); give a checkpoint of nnU-Net or a state dict"
        ) from error
    weights = content.get("network_weights", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise CommandError(f"{path} holds no weights; give a checkpoint of nnU-Net or a state dict")
    return _Checkpoint(weights, content.get("init_args", {}) if weights is not content else {})


def _load(network: nn.Module, weights: Mapping[str, Tensor], path: Path | None) -> None:
    expected = network.state_dict()
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unknown": [key for key in weights if key not in expected],
        "of another shape": [key for key in expected if key in weights and weights[key].shape != expected[key].shape],
    }
    found = [f"{len(keys)} {what}, e.g. {keys[0]}" for what, keys in problems.items() if keys]
    if found:
        raise CommandError(
            f"the weights in {path} do not fit the network ({'; '.join(found)}); give the plans, configuration, "
            "channels and classes of that training"
        )
    network.load_state_dict(dict(weights))
