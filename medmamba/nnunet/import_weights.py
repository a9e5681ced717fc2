"""Published weights in the network of a plan, as a file that nnU-Net's ``-pretrained_weights`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medmamba.command import CommandError
from medmamba.files import write_atomically
from medmamba.nnunet import folders
from medmamba.nnunet.architecture import ArchitectureError, initial_network, network_ends, network_of
from medmamba.weights import Report, WeightsError, load_published, read_checkpoint

_SEED = 0


@dataclass(frozen=True)
class Import:
    """What the user asked for. See ``medmamba import-weights --help``."""

    checkpoint: Path
    configuration: str
    output: Path
    dataset: str | None = None
    plans: str | None = None
    input_channels: int | None = None
    num_classes: int | None = None
    mirror_decoder: bool = False
    allow_partial: bool = False


def import_weights(wish: Import) -> Report:
    """Build the network of the plan, load what was published, and write all of its weights.

    What the checkpoint does not hold keeps its initial values, drawn with seed 0. The file holds ``network_weights``, a
    state dict on the CPU: stock ``nnUNetv2_train -pretrained_weights`` wants every key but those of the heads, which it
    leaves out.

    Raises:
        CommandError: plans, configuration, dataset or checkpoint are not there or do not fit together.
    """
    if not wish.output.resolve().parent.is_dir():
        raise CommandError(f"{wish.output.resolve().parent} is not a folder; create it or choose another -o")
    plans, dataset_json = _plans_of(wish)
    configuration = folders.configuration_of(plans, wish.configuration)
    network = _network(wish, plans, configuration, dataset_json)
    try:
        weights = read_checkpoint(wish.checkpoint)
        report = load_published(network, weights, mirror_decoder=wish.mirror_decoder, allow_partial=wish.allow_partial)
    except WeightsError as error:
        raise CommandError(str(error)) from error
    content = {"network_weights": network.state_dict(), "medmamba_source": report.source}
    try:
        write_atomically(wish.output, lambda temporary: torch.save(content, temporary))
    except OSError as error:
        raise CommandError(f"{wish.output} cannot be written ({error.strerror}); make the folder writable") from error
    return report


def _plans_of(wish: Import) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Plans, and dataset.json if it lies beside them."""
    if wish.dataset is not None:
        preprocessed = folders.folder("nnUNet_preprocessed")
        name = wish.plans or "nnUNetPlans"
        path = preprocessed / folders.find_dataset(wish.dataset, [preprocessed]) / f"{name}.json"
        return folders.read_plans(path.parent, name), folders.read_dataset_json_beside(path)
    path = Path(wish.plans or "")
    if path.suffix != ".json":
        raise CommandError("name a dataset and its plans, -d 4 -p PLANS, or give a plans file, -p FILE.json")
    return folders.read_plans_file(path), folders.read_dataset_json_beside(path)


def _network(
    wish: Import, plans: dict[str, Any], configuration: Mapping[str, Any], dataset_json: Mapping[str, Any] | None
) -> nn.Module:
    block = configuration.get("architecture")
    try:
        if block is None or network_of(block) is None:
            raise CommandError(
                f"plans {plans.get('plans_name')} name no network of medmamba; make such plans with "
                "`medmamba plan --network vmunet --geometry faithful`"
            )
        channels, classes = _ends(wish, plans, configuration, dataset_json)
        return initial_network(block, channels, classes, _SEED)
    except ArchitectureError as error:
        raise CommandError(str(error)) from error


def _ends(
    wish: Import, plans: dict[str, Any], configuration: Mapping[str, Any], dataset_json: Mapping[str, Any] | None
) -> tuple[int, int]:
    channels, classes = wish.input_channels, wish.num_classes
    if (channels is None or classes is None) and dataset_json is not None:
        planned, heads = network_ends(plans, configuration, dataset_json)
        channels = planned if channels is None else channels
        classes = heads if classes is None else classes
    if channels is None or classes is None:
        raise CommandError(
            "there is no dataset.json beside the plans that names channels and classes; give --input-channels and "
            "--num-classes"
        )
    if min(channels, classes) < 1:
        raise CommandError(f"--input-channels and --num-classes must be 1 or more, not {channels} and {classes}")
    return channels, classes
