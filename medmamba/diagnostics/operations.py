"""Multiply-accumulate operations of a network, counted by a forward pass without data, and the share of its scans.

One multiply-accumulate (MAC) is two floating-point operations (FLOP). Convolutions, linear layers and matrix products
are counted; norms, activations and additions are not. A scan counts 9 L E N FLOP per route for L tokens, E channels
and N states, the convention of VMamba's code, and L E R MACs for step sizes of rank R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from medmamba.mixers import RoutedScan
from medmamba_kernels.backends import assume_backend

SCAN_FLOP = 9  # per token, channel, state and route


@dataclass(frozen=True)
class Operations:
    """MACs of a forward pass on one patch: all, and those inside the scans with their projections."""

    total: float
    scans: float


def operations(network: nn.Module, input_channels: int, patch_size: Sequence[int]) -> Operations:
    """Count the MACs of a forward pass on one patch, in training (all heads).

    Args:
        network: any module (1, C, *patch) -> anything; it may lie on any device, and its weights are not read.
        input_channels: C.
        patch_size: voxels per axis.

    Raises:
        ValueError: a patch that the network refuses.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.medmamba.selective_scan: scan_flop})
    started, inside = [], []
    hooks = []
    for module in network.modules():
        if isinstance(module, RoutedScan):
            hooks.append(module.register_forward_pre_hook(lambda *_: started.append(counter.get_total_flops())))
            hooks.append(module.register_forward_hook(lambda *_: inside.append(counter.get_total_flops())))
    meta = {
        name: tensor.detach().to("meta") for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    try:
        with assume_backend("torch"), torch.no_grad(), counter:
            functional_call(network, meta, torch.empty(1, input_channels, *patch_size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return Operations(counter.get_total_flops() / 2, (sum(inside) - sum(started)) / 2)


def scan_flop(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, dt_weight: Any, *_: Any, **__: Any) -> int:
    """FLOP of a scan from the shapes of its arguments, as :class:`FlopCounterMode` calls it."""
    batch, length, channels = x
    routes, states = B[2:]
    rank = 0 if dt_weight is None else dt_weight[-1]
    tokens: int = batch * length * routes
    return tokens * channels * SCAN_FLOP * states + 2 * tokens * (dt_weight[1] if rank else 0) * rank
