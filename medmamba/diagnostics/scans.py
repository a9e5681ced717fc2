"""The decay of the scans of a network: from its weights, or measured on an input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.mixers import RoutedScan

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class StepSizes:
    """What decides how long a scan remembers.

    Attributes:
        dt: (K, c) one step size per route, or set of weights that routes share, and channel or head.
        A: (K, c, N), or (K, c) for a scan with one rate per channel or head; negative.
    """

    dt: Tensor
    A: Tensor


def step_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, StepSizes]:
    """Step sizes softplus(dt_bias) and A of every scan in a state dict, by the name of its module.

    Routes that share a set of weights are one row: a state dict does not tell them apart.

    The part of dt that depends on the input is left out: at initialisation it is small against the bias, after
    training :func:`measure_step_sizes` is the better answer. Works for ``network.state_dict()`` as for the
    ``network_weights`` of a checkpoint of nnU-Net; a state dict without scans gives an empty dict.
    """
    names = [key.removesuffix("A_log").removesuffix(".") for key in state_dict if key.split(".")[-1] == "A_log"]
    found = {}
    for name in names:
        prefix = f"{name}." if name else ""
        bias, log = (state_dict[f"{prefix}{leaf}"].detach().cpu().double() for leaf in ("dt_bias", "A_log"))
        found[name] = StepSizes(F.softplus(bias), -torch.exp(log))
    return found


def measure_step_sizes(network: nn.Module, x: Tensor) -> dict[str, StepSizes]:
    """Mean step size of every scan over the tokens of an input, by the name of its module.

    exp(-n |A| mean dt) is the geometric mean of the surviving shares over all places; what differs from place to place
    is for :func:`medmamba.diagnostics.surviving_share` with all step sizes (:meth:`RoutedScan.step_sizes`).

    Args:
        network: on the device of ``x``; runs in eval mode without gradients, and is left in the mode it was in.
        x: (b, C, *spatial), as the network takes it: normalised as in training.

    Raises:
        ValueError: an input that the network refuses.
    """
    found: dict[str, StepSizes] = {}

    def hook_of(name: str) -> Any:
        def record(core: nn.Module, inputs: tuple[Tensor, Any]) -> None:
            assert isinstance(core, RoutedScan)
            # Pieces of the sequence: all step sizes together are K times the feature map.
            pieces = [core.step_sizes(u).double().sum((0, 1)) for u in inputs[0].split(_TOKENS_AT_ONCE, dim=1)]
            mean = torch.stack(pieces).sum(0) / inputs[0].shape[:2].numel()
            found[name] = StepSizes(mean.cpu(), -torch.exp(core.per_route(core.A_log.detach().cpu().double())))

        return record

    scans = [(name, module) for name, module in network.named_modules() if isinstance(module, RoutedScan)]
    hooks = [module.register_forward_pre_hook(hook_of(name)) for name, module in scans]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(x)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return found
