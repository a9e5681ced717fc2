"""Plans under which a dataset looks like the images of a pretraining, and whether given plans do.

An encoder continues where it stopped only if it is fed as before: the same axes, spacing and intensities. Its
description says how, and nnU-Net's plans can say all of it, so that stock nnU-Net does the work.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.networks import get_spec
from medmamba.nnunet.architecture import ArchitectureError, check_patch, network_of
from medmamba.nnunet.folders import configuration_of
from medmamba.nnunet.names import plans_name
from medmamba.weights import EncoderDescription, read_encoder
from medmamba_plans.derive import PlanError, Request

if TYPE_CHECKING:
    from torch import Tensor

CONFIGURATION = "3d_fullres"
#: Readers of nnU-Net that give every image in one orientation, and that orientation along the axes of the array.
READERS = {"NibabelIOWithReorient": "SAR"}
#: Arguments of networks that the encoder does not have.
_DECODERS = frozenset({"decoder_depths", "auxiliary_heads", "two_step_head", "expand_norm", "ffn_scales"})
#: Arguments that change neither weights nor function of a network in use.
_TRAININGS = frozenset({"drop_path_rate", "checkpoint_style", "dt_init"})
_SAME_SPACING = 0.01


@dataclass(frozen=True)
class Encoder:
    """An encoder file that was read.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        description: what it says about itself.
        tensors: names as in ``network.encoder``.
    """

    path: Path
    sha256: str
    description: EncoderDescription
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Encoder:
        """Read an encoder file.

        Raises:
            WeightsError: as :func:`medmamba.weights.read_encoder`.
        """
        description, tensors = read_encoder(path)
        with path.open("rb") as stream:
            return cls(path, hashlib.file_digest(stream, "sha256").hexdigest(), description, tensors)

    @property
    def tag(self) -> str:
        """Short name of this file's content, as it stands in names of plans."""
        return self.sha256[:8]

    @property
    def origin(self) -> str:
        """What plans for it are derived from, in place of the name of stock plans."""
        return f"encoder {self.tag}"

    @property
    def default_plans_name(self) -> str:
        return plans_name(self.description.network, f"Like{self.tag}")

    def as_json(self) -> dict[str, Any]:
        """What plans and weights say about where they come from; plain values."""
        facts = self.description
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "corpus": dict(facts.corpus),
            "citation": list(facts.citation),
            "version": facts.version,
        }


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
    for number, name in _channel_names(dataset_json).items():
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


def derive_like(
    stock: Mapping[str, Any], encoder: Encoder, request: Request, dataset_json: Mapping[str, Any]
) -> dict[str, Any]:
    """Plans with the one configuration ``3d_fullres`` that fit an encoder; the stock plans are not changed.

    Args:
        stock: plans of nnU-Net for the dataset.
        encoder: what to be like.
        request: of its network; name, batch, patch and schedule are used.
        dataset_json: of the dataset.

    Returns:
        a plans dictionary of JSON values.

    Raises:
        PlanError: dataset, encoder and request do not fit together.
    """
    description = encoder.description
    check_encoder(description)
    check_dataset(description, dataset_json)
    if CONFIGURATION not in stock["configurations"]:
        raise PlanError(f"the stock plans have no {CONFIGURATION}: a dataset of images; the encoder needs volumes")
    plans = deepcopy(dict(stock))
    channels = len(_channel_names(dataset_json))
    configuration = configuration_of(stock, CONFIGURATION)
    for key in ("inherits_from", "next_stage", "previous_stage"):
        configuration.pop(key, None)
    patch = list(request.patch_size or description.patch_size)
    block = _block(description)
    try:
        check_patch(patch, block["arch_kwargs"]["strides"])
    except ArchitectureError as error:
        raise PlanError(str(error)) from error
    _in_order_of_the_file(plans)
    plans |= {
        "plans_name": request.plans_name,
        "image_reader_writer": description.reader,
        "foreground_intensity_properties_per_channel": _intensities(stock, description, channels),
        "configurations": {
            CONFIGURATION: configuration
            | {
                "data_identifier": f"{request.plans_name}_{CONFIGURATION}",
                "batch_size": request.batch_size or _batch_size(configuration, patch),
                "patch_size": patch,
                "median_image_size_in_voxels": _median_size(plans, description.spacing_mm),
                "spacing": list(description.spacing_mm),
                "normalization_schemes": [description.normalisation["scheme"]] * channels,
                "use_mask_for_norm": [False] * channels,
                "architecture": block,
            }
        },
        "medmamba": {
            "network": description.network,
            "variant": None,
            "options": dict(description.arguments),
            "dt_init": "default",
            "gpu_gb": None,
            "schedule": request.schedule.to_dict(),
            "derived_from": encoder.origin,
            "like": encoder.as_json(),
            "version": version("medmamba"),
        },
    }
    check_like(description, plans, CONFIGURATION, dataset_json)
    return plans


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
        *_normalisation_problems(description, plans, planned, len(_channel_names(dataset_json))),
        *_network_problems(description, planned),
    ]
    if problems:
        raise PlanError(
            f"plans {plans.get('plans_name')}, {configuration}, do not fit the encoder: {'; '.join(problems)}; make "
            "plans that do with `medmamba plan --like` without --from"
        )


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
    constants = _constants(description)
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
    wanted = _block(description)["arch_kwargs"]
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


def _block(description: EncoderDescription) -> dict[str, Any]:
    spec = get_spec(description.network)
    arguments = {**spec.defaults, **description.arguments}
    return {"network_class_name": spec.build, "arch_kwargs": arguments, "_kw_requires_import": []}


def _channel_names(dataset_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """nnU-Net's older name of the entry is ``modality``."""
    names: Mapping[str, Any] = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    return names


def _endings(reader: str) -> list[str]:
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    return list(recursive_find_reader_writer_by_name(reader).supported_file_endings)


def _batch_size(stock: Mapping[str, Any], patch: Sequence[int]) -> int:
    """As many voxels per batch as nnU-Net planned, and at least 2 patches."""
    return max(2, stock["batch_size"] * math.prod(stock["patch_size"]) // math.prod(patch))


def _constants(description: EncoderDescription) -> dict[str, float]:
    """What nnU-Net's CTNormalization reads: clip to the percentiles, subtract the mean, divide by std."""
    wanted = description.normalisation
    return {
        "percentile_00_5": wanted["low"],
        "percentile_99_5": wanted["high"],
        "mean": wanted["mean"],
        "std": wanted["std"],
    }


def _intensities(stock: Mapping[str, Any], description: EncoderDescription, channels: int) -> dict[str, Any]:
    properties = deepcopy(dict(stock["foreground_intensity_properties_per_channel"]))
    if description.normalisation["scheme"] == "CTNormalization":
        for channel in range(channels):
            properties[str(channel)] = {**properties.get(str(channel), {}), **_constants(description)}
    return properties


def _in_order_of_the_file(plans: dict[str, Any]) -> None:
    """Take nnU-Net's exchange of axes back, of the medians too."""
    back = plans["transpose_backward"]
    for name in ("original_median_spacing_after_transp", "original_median_shape_after_transp"):
        plans[name] = [plans[name][axis] for axis in back]
    plans["transpose_forward"] = plans["transpose_backward"] = [0, 1, 2]


def _median_size(plans: Mapping[str, Any], spacing_mm: Sequence[float]) -> list[float]:
    sizes, spacings = plans["original_median_shape_after_transp"], plans["original_median_spacing_after_transp"]
    return [
        float(round(size * before / after)) for size, before, after in zip(sizes, spacings, spacing_mm, strict=True)
    ]


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
