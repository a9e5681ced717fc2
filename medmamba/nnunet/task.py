"""What a network is fed with and asked for, to tell whether one can teach another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medmamba.nnunet import folders
from medmamba.nnunet.architecture import network_ends


@dataclass(frozen=True)
class Task:
    """What a network is fed with and asked for.

    Attributes:
        plans: of nnU-Net.
        configuration: of the plans, with what it inherits, and an architecture block.
        dataset_json: of the dataset.
    """

    plans: Mapping[str, Any]
    configuration: Mapping[str, Any]
    dataset_json: Mapping[str, Any]

    @classmethod
    def of(cls, plans: Mapping[str, Any], configuration_name: str, dataset_json: Mapping[str, Any]) -> Task:
        """The task of a configuration; plans of nnU-Net before 2.5 are read as well.

        Raises:
            CommandError: the plans have no such configuration.
        """
        configuration = folders.configuration_of(plans, configuration_name)
        if "architecture" not in configuration:
            from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

            configuration = ConfigurationManager(configuration).configuration
        return cls(plans, configuration, dataset_json)

    @property
    def ends(self) -> tuple[int, int]:
        """Input channels and outputs of a network for it."""
        return network_ends(self.plans, self.configuration, self.dataset_json)


def differences(one: Task, other: Task) -> list[tuple[str, str, str]]:
    """What two networks do not share that read the same preprocessed data and mean the same by their outputs.

    Returns:
        name and both values, short enough for a line; none where one network could stand in for the other, but for its
        patch and its shape.
    """
    found = []
    for name, value in _MEANING.items():
        first, second = (json.dumps(value(task), sort_keys=True) for task in (one, other))
        if first != second:
            found.append((name, _short(first), _short(second)))
    return found


def _labels(task: Task) -> object:
    labels = task.dataset_json["labels"]
    given = {name: value for name, value in labels.items() if name != "ignore"}
    has_regions = any(isinstance(value, list | tuple) and len(value) > 1 for value in given.values())
    # The order of regions is that of the outputs; of labels, the numbers are.
    return [list(given.items()), task.dataset_json.get("regions_class_order")] if has_regions else given


def _channels(task: Task) -> object:
    names = task.dataset_json.get("channel_names", task.dataset_json.get("modality", {}))
    return [names[key] for key in sorted(names, key=int)]


def _intensities(task: Task) -> object:
    """What the normalisation of CT is made of; other schemes look at the image alone."""
    name = "foreground_intensity_properties_per_channel"
    given = task.plans.get(name, task.plans.get("foreground_intensity_properties_by_modality", {}))
    schemes = task.configuration["normalization_schemes"]
    keys = ("mean", "std", "percentile_00_5", "percentile_99_5")
    return [
        [given[str(i)][key] for key in keys] if scheme == "CTNormalization" else None
        for i, scheme in enumerate(schemes)
    ]


_MEANING: Mapping[str, Callable[[Task], object]] = {
    "labels": _labels,
    "channels": _channels,
    "axes": lambda task: len(task.configuration["patch_size"]),
    "input channels": lambda task: task.ends[0],
    "transpose": lambda task: task.plans["transpose_forward"],
    "spacing": lambda task: [round(value, 6) for value in task.configuration["spacing"]],
    "normalisation": lambda task: task.configuration["normalization_schemes"],
    "masks in normalisation": lambda task: task.configuration["use_mask_for_norm"],
    "intensities": _intensities,
}


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
