"""Plans under which a dataset looks like the images of a pretraining.

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

from medmamba.nnunet.architecture import ArchitectureError, check_patch
from medmamba.nnunet.folders import configuration_of
from medmamba.nnunet.names import plans_name
from medmamba.weights import EncoderDescription, read_encoder
from medmamba_plans.derive import PlanError, Request
from medmamba_plans.like_check import (
    CONFIGURATION,
    architecture_of,
    channel_names,
    check_dataset,
    check_encoder,
    check_like,
    constants_of,
)

if TYPE_CHECKING:
    from torch import Tensor


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
    channels = len(channel_names(dataset_json))
    configuration = configuration_of(stock, CONFIGURATION)
    for key in ("inherits_from", "next_stage", "previous_stage"):
        configuration.pop(key, None)
    patch = list(request.patch_size or description.patch_size)
    block = architecture_of(description)
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


def _batch_size(stock: Mapping[str, Any], patch: Sequence[int]) -> int:
    """As many voxels per batch as nnU-Net planned, and at least 2 patches."""
    return max(2, stock["batch_size"] * math.prod(stock["patch_size"]) // math.prod(patch))


def _intensities(stock: Mapping[str, Any], description: EncoderDescription, channels: int) -> dict[str, Any]:
    properties = deepcopy(dict(stock["foreground_intensity_properties_per_channel"]))
    if description.normalisation["scheme"] == "CTNormalization":
        for channel in range(channels):
            properties[str(channel)] = {**properties.get(str(channel), {}), **constants_of(description)}
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
