"""The ``architecture`` block of a plans configuration: whose network it names, and how ours is derived from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pydoc import locate
from typing import Any

import torch
from torch import nn

from medmamba.networks import NETWORKS, get_spec
from medmamba.nnunet.errors import UserFacingError


class ArchitectureError(UserFacingError, ValueError):
    """The plans and the wanted network do not fit together; the text says why and what to do."""


def network_of(block: Mapping[str, Any]) -> str | None:
    """Registry name of the network that an architecture block names, or None if the network is not ours.

    Raises:
        ArchitectureError: the path lies in medmamba but leads to no network of this version.
    """
    path = block["network_class_name"]
    for spec in NETWORKS.values():
        if spec.build == path:
            return spec.name
    if path.startswith("medmamba."):
        raise ArchitectureError(
            f"the plans name the network {path}, which this version of medmamba does not have (it has "
            f"{', '.join(NETWORKS)}); install the version that wrote the plans, or run `medmamba plan` again"
        )
    return None


def architecture_block(
    network: str, stock: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Architecture block of one of our networks, with the shape that nnU-Net planned for its own.

    Args:
        network: registry name.
        stock: an architecture block of nnU-Net (PlainConvUNet, ResidualEncoderUNet, or any with ``strides``).
        options: arguments of the network that win over its defaults and over the plan.

    Returns:
        ``{"network_class_name", "arch_kwargs", "_kw_requires_import"}`` of plain JSON values.

    Raises:
        KeyError: unknown network; the text lists the known ones.
        ArchitectureError: the block has no strides to follow.
    """
    spec = get_spec(network)
    planned = stock["arch_kwargs"]
    if "strides" not in planned:
        raise ArchitectureError(
            f"the plans describe {stock['network_class_name']} without strides, so there is no shape to follow; start "
            "from plans of nnU-Net's PlainConvUNet or ResEnc planners"
        )
    chosen = {**spec.defaults, **(options or {})}
    if chosen.get("mixer") is not None:
        chosen = {name: value for name, value in chosen.items() if name not in spec.block_arguments}
    arguments = {**_shape(planned, chosen, spec.published_strides), **chosen}
    return {
        "network_class_name": spec.build,
        "arch_kwargs": json.loads(json.dumps(arguments)),
        "_kw_requires_import": [],
    }


def placed_mixer(mixer: str | Mapping[str, Any], configuration: Mapping[str, Any]) -> str | dict[str, Any]:
    """A mixer with the spacing of a configuration, which some of its cores want to know.

    Args:
        mixer: its name, or a mapping with ``name`` and options; a spacing in it stays.
        configuration: of the plans. One without a spacing of its own leaves the mixer as it is.
    """
    options = {"name": mixer} if isinstance(mixer, str) else dict(mixer)
    if "spacing" not in configuration:
        return mixer if isinstance(mixer, str) else options
    # A 2D configuration has the spacing of the image in the plane.
    spacing = list(configuration["spacing"])[-len(configuration["patch_size"]) :]
    return {"spacing": spacing, **options}


def build_network(block: Mapping[str, Any], input_channels: int, num_classes: int) -> nn.Module:
    """The network of an architecture block, ours or nnU-Net's, with deep supervision; on torch's current device.

    Raises:
        ArchitectureError: the block names no network that can be imported.
    """
    arguments = dict(block["arch_kwargs"])
    for name in block["_kw_requires_import"]:
        if arguments[name] is not None:
            arguments[name] = locate(arguments[name])
    build: Any = locate(block["network_class_name"])
    if build is None:
        raise ArchitectureError(f"the network {block['network_class_name']} of the plans cannot be imported")
    network: nn.Module = build(
        input_channels=input_channels, num_classes=num_classes, **arguments, deep_supervision=True
    )
    return network


def initial_network(block: Mapping[str, Any], input_channels: int, num_classes: int, seed: int) -> nn.Module:
    """As :func:`build_network`, with initial values drawn from a seed; torch's random state stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_network(block, input_channels, num_classes)


def network_ends(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], dataset_json: Mapping[str, Any]
) -> tuple[int, int]:
    """Input channels and classes of a network as nnU-Net reads them from dataset.json.

    Args:
        plans: that the configuration is of.
        configuration: with what it inherits; the second stage of a cascade gets the labels as further channels.
        dataset_json: of the dataset.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

    manager = PlansManager(dict(plans))
    channels = determine_num_input_channels(manager, ConfigurationManager(dict(configuration)), dataset_json)
    return channels, manager.get_label_manager(dataset_json).num_segmentation_heads


def _shape(planned: Mapping[str, Any], chosen: Mapping[str, Any], published_strides: Sequence[int]) -> dict[str, Any]:
    """Strides, kernels and widths from nnU-Net's plan.

    The faithful geometry has at most the published number of stages and widths of its own. Where the published
    network opens with a patch embedding, that replaces nnU-Net's first two downsamplings (stride 4 where the plan is
    isotropic, as published).
    """
    strides = planned["strides"]
    kernels = planned.get("kernel_sizes")
    last = len(published_strides)
    if chosen.get("geometry") == "faithful" and published_strides[1] == 2:
        shape = {"strides": strides[:last]}
        return shape if kernels is None else {**shape, "kernel_sizes": kernels[:last]}
    if chosen.get("geometry") == "faithful":
        if len(strides) < 3:
            raise ArchitectureError(
                "the faithful geometry replaces the first two downsamplings of the plan, which has "
                f"{len(strides) - 1}; use --geometry native"
            )
        embedding = [first * second for first, second in zip(strides[1], strides[2], strict=True)]
        shape = {"strides": [strides[0], embedding, *strides[3:]][:last]}
        return shape if kernels is None else {**shape, "kernel_sizes": [kernels[0], *kernels[2:]][:last]}
    shape = {"strides": strides}
    if kernels is not None:
        shape["kernel_sizes"] = kernels
    if "base_features" not in chosen and "features_per_stage" in planned:
        shape["features_per_stage"] = planned["features_per_stage"]
    return shape


def check_patch(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
    """Raise unless every axis of the patch is divisible by the product of its strides.

    Raises:
        ArchitectureError: the number of axes differs, or an axis is not divisible; the text names sizes that
            are.
    """
    if len(patch_size) != len(strides[0]):
        raise ArchitectureError(
            f"patch {list(patch_size)} has {len(patch_size)} axes, the strides have {len(strides[0])}"
        )
    factors = [prod(stage[axis] for stage in strides) for axis in range(len(patch_size))]
    for axis, (size, factor) in enumerate(zip(patch_size, factors, strict=True)):
        if size < 1 or size % factor:
            lower, upper = size // factor * factor, (size // factor + 1) * factor
            fitting = f"{lower} or {upper}" if lower > 0 else f"{upper}"
            raise ArchitectureError(
                f"patch {'x'.join(map(str, patch_size))} does not fit the strides of the plan: axis {axis} must be a "
                f"multiple of {factor}, not {size}; use {fitting}"
            )
