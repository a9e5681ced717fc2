"""The scans of a network and the grids that they read, found by a run without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from medmamba_kernels.routes import Grid

from .routed import RoutedScan
from .timescale import route_dt_range


@dataclass(frozen=True)
class PlacedScan:
    """One scan of a network.

    Attributes:
        name: path of the module in the network, e.g. ``encoder.stages.2.blocks.0.ss2d.core``.
        core: the scan.
        grid: (D, H, W) tokens that it reads.
    """

    name: str
    core: RoutedScan
    grid: Grid


def placed_scans(network: nn.Module, input_channels: int, patch_size: Sequence[int]) -> list[PlacedScan]:
    """The scans of a network in the order in which they run on a patch; empty for the control without scans.

    The network runs on torch's meta device, so this needs neither memory nor time, and its weights are not read.

    Args:
        network: any module (B, C, *spatial) -> anything; it may lie on any device.
        input_channels: C.
        patch_size: two or three numbers of voxels, as the network wants.

    Raises:
        ValueError: a patch that the network refuses.
    """
    found: list[PlacedScan] = []

    def record(name: str, core: RoutedScan) -> Any:
        return core.register_forward_pre_hook(lambda _, inputs: found.append(PlacedScan(name, core, inputs[1])))

    hooks = [record(name, module) for name, module in network.named_modules() if isinstance(module, RoutedScan)]
    meta: dict[str, Tensor] = {
        name: tensor.detach().to("meta") for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    was_training = network.training
    try:
        with torch.no_grad():
            functional_call(network.eval(), meta, torch.empty(1, input_channels, *patch_size, device="meta"))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def initialise_step_sizes(
    network: nn.Module,
    dt_init: Sequence[float] | Mapping[str, Any] | None,
    *,
    input_channels: int,
    generator: torch.Generator | None = None,
) -> None:
    """Draw the step sizes of every scan of a new network from another range than Mamba's.

    Only ``dt_bias`` changes, and it is drawn last: with the same seed all other weights stay the same.

    Args:
        network: a network with its initial weights.
        dt_init: None leaves the network as it is; ``(low, high)`` is the range of every scan; a mapping
            with ``patch_size`` (voxels per axis), and if known ``spacing`` (mm per axis of the patch) and ``reach_mm``,
            gives every route the range that :func:`medmamba.mixers.timescale.route_dt_range` derives. All of
            these are values that a plans file can hold.
        input_channels: of the network.
        generator: of the random numbers; default: torch's own.

    Raises:
        ValueError: a range, patch or spacing that is not possible, or an unknown key.
    """
    if dt_init is None:
        return
    if not isinstance(dt_init, Mapping):
        for module in network.modules():
            if isinstance(module, RoutedScan):
                module.reset_step_sizes(dt_init, generator=generator)
        return
    unknown = set(dt_init) - {"patch_size", "spacing", "reach_mm"}
    if unknown or "patch_size" not in dt_init:
        raise ValueError(f"dt_init needs patch_size and may have spacing and reach_mm, got {sorted(dt_init)}")
    patch = list(dt_init["patch_size"])
    spacing = list(dt_init.get("spacing") or [1.0] * len(patch))
    if len(spacing) != len(patch):
        raise ValueError(
            f"dt_init has a patch of {len(patch)} axes and a spacing of {len(spacing)}: {patch}, {spacing}"
        )
    patch, spacing = ([1] * (3 - len(patch)) + patch), ([1.0] * (3 - len(spacing)) + spacing)
    for scan in placed_scans(network, input_channels, dt_init["patch_size"]):
        token_mm = [s * voxels / tokens for s, voxels, tokens in zip(spacing, patch, scan.grid, strict=True)]
        scan.core.reset_step_sizes(
            [route_dt_range(route, scan.grid, token_mm, dt_init.get("reach_mm")) for route in scan.core.routes],
            generator=generator,
        )
