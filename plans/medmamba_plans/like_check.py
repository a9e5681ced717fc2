"""Whether an encoder is fed as in its pretraining: what a dataset, and its plans, must have in common with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medmamba.networks import get_spec
from medmamba.nnunet.architecture import ArchitectureError, check_patch, network_of
from medmamba.nnunet.folders import configuration_of
from medmamba.weights import EncoderDescription
from medmamba_plans.derive import PlanError

CONFIGURATION = "3d_fullres"
#: Readers of nnU-Net that give every image in one orientation, and that orientation along the axes of the array.
READERS = {"NibabelIOWithReorient": "SAR"}
#: Arguments of networks that the encoder does not have.
_DECODERS = frozenset({"decoder_depths", "auxiliary_heads", "two_step_head", "expand_norm", "ffn_scales"})
#: Arguments that change neither weights nor function of a network in use.
_TRAININGS = frozenset({"drop_path_rate", "checkpoint_style", "dt_init"})
_SAME_SPACING = 0.01


def check_encoder(description: EncoderDescription) -> None:
    """Refuse an encoder whose images nnU-Net cannot reproduce.

    Raises:
        PlanError: not 3D, or axes that no reader of nnU-Net gives.
    """
    axes = len(description.patch_size)
    if axes != 3:
        raise PlanError(f"the encoder has {axes} axes, and plans like it are for volumes ({CONFIGURATION}, 3 axes)")
    given = READERS.get(description.reader)
    if given != description.axes:
        known = ", ".join(f"{reader} ({axes})" for reader, axes in READERS.items())
        raise PlanError(
            f"the encoder was trained on arrays with axes {description.axes} read by {description.reader}; known are "
            f"{known}, because other readers of nnU-Net give the axes of the file"
        )


def check_dataset(description: EncoderDescription, dataset_json: Mapping[str, Any]) -> None:
    """Refuse a dataset of another modality, or of files that the encoder's reader cannot read.

    Raises:
        PlanError: the text says why and what to do.
    """
    for number, name in channel_names(dataset_json).items():
        is_ct = str(name).casefold() == "ct"
        if is_ct and description.modality != "ct":
            raise PlanError(
                f"channel {number} of the dataset is CT, the encoder was trained on {description.modality.upper()}; "
                "use an encoder that was trained on CT"
            )
        if description.modality == "ct" and not is_ct:
            raise PlanError(
                f"channel {number} of the dataset is {name!r}, the encoder was trained on CT; use an encoder of that "
                "modality, or call the channel CT in dataset.json if its values are HU"
            )
    ending = dataset_json.get("file_ending")
    endings = _endings(description.reader)
    if ending not in endings:
        raise PlanError(
            f"the dataset's files end in {ending!r}, and {description.reader}, which gives the axes of the "
            f"pretraining, reads {' and '.join(endings)}; convert images and labels"
        )


def check_like(
    description: EncoderDescription,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    """Refuse plans under which an encoder would be fed otherwise than in pretraining, or not fit.

    Args:
        description: of the encoder.
        plans: of a dataset, ours.
        configuration: its name.
        dataset_json: of the dataset.

    Raises:
        PlanError: what differs, all of it: reader, axes, spacing, normalisation, network, arguments, patch, modality.
        CommandError: the plans have no such configuration.
    """
    check_encoder(description)
    check_dataset(description, dataset_json)
    planned = configuration_of(plans, configuration)
    problems = [
        *_reading_problems(description, plans, planned),
        *_normalisation_problems(description, plans, planned, len(channel_names(dataset_json))),
        *_network_problems(description, planned),
    ]
    if problems:
        raise PlanError(
            f"plans {plans.get('plans_name')}, {configuration}, do not fit the encoder: {'; '.join(problems)}; make "
            "plans that do with `medmamba plan --like` without --from"
        )


def architecture_of(description: EncoderDescription) -> dict[str, Any]:
    """The architecture block of plans with the encoder's network."""
    spec = get_spec(description.network)
    arguments = {**spec.defaults, **description.arguments}
    return {"network_class_name": spec.build, "arch_kwargs": arguments, "_kw_requires_import": []}


def channel_names(dataset_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """By number; nnU-Net's older name of the entry is ``modality``."""
    names: Mapping[str, Any] = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    return names


def constants_of(description: EncoderDescription) -> dict[str, float]:
    """What nnU-Net's CTNormalization reads: clip to the percentiles, subtract the mean, divide by std."""
    wanted = description.normalisation
    return {
        "percentile_00_5": wanted["low"],
        "percentile_99_5": wanted["high"],
        "mean": wanted["mean"],
        "std": wanted["std"],
    }


def _reading_problems(
    description: EncoderDescription, plans: Mapping[str, Any], planned: Mapping[str, Any]
) -> list[str]:
    problems = []
    reader, axes = plans.get("image_reader_writer"), plans.get("transpose_forward")
    if reader != description.reader:
        problems.append(f"they read images with {reader}, the encoder needs {description.reader}")
    if axes != [0, 1, 2]:
        problems.append(f"they exchange the axes (transpose_forward {axes}), the encoder needs [0, 1, 2]")
    spacing = planned.get("spacing", [])
    if len(spacing) != len(description.spacing_mm) or not all(
        math.isclose(ours, theirs, rel_tol=_SAME_SPACING)
        for ours, theirs in zip(spacing, description.spacing_mm, strict=True)
    ):
        problems.append(f"their spacing is {_times(spacing)} mm, the encoder's {_times(description.spacing_mm)} mm")
    return problems


def _normalisation_problems(
    description: EncoderDescription, plans: Mapping[str, Any], planned: Mapping[str, Any], channels: int
) -> list[str]:
    wanted = description.normalisation
    scheme = wanted["scheme"]
    schemes = planned.get("normalization_schemes")
    if schemes != [scheme] * channels:
        return [f"their normalisation is {schemes}, the encoder's {scheme} for each of {channels} channels"]
    if scheme != "CTNormalization":
        masks = planned.get("use_mask_for_norm")
        return [f"they normalise within a mask ({masks}), the encoder had none"] if masks != [False] * channels else []
    properties = plans.get("foreground_intensity_properties_per_channel", {})
    constants = constants_of(description)
    for channel in range(channels):
        found = {name: properties.get(str(channel), {}).get(name) for name in constants}
        if found != constants:
            return [f"channel {channel} is normalised with {found}, the encoder's images were with {constants}"]
    return []


def _network_problems(description: EncoderDescription, planned: Mapping[str, Any]) -> list[str]:
    block = planned.get("architecture")
    try:
        network = network_of(block) if block else None
    except ArchitectureError as error:
        raise PlanError(str(error)) from error
    if block is None or network != description.network:
        other = network or (block or {}).get("network_class_name")
        return [f"their network is {other}, the encoder's {description.network}"]
    wanted = architecture_of(description)["arch_kwargs"]
    given = {**get_spec(network).defaults, **block["arch_kwargs"]}
    names = sorted((given.keys() | wanted.keys()) - _DECODERS - _TRAININGS)
    problems = [
        f"their network has {name} {given.get(name)}, the encoder's {wanted.get(name)}"
        for name in names
        if given.get(name) != wanted.get(name)
    ]
    try:
        check_patch(planned["patch_size"], wanted["strides"])
    except ArchitectureError as error:
        problems.append(str(error))
    return problems


def _endings(reader: str) -> list[str]:
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    return list(recursive_find_reader_writer_by_name(reader).supported_file_endings)


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
