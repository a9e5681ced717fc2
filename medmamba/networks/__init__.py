"""The networks, one file per paper, over one skeleton. Need torch only."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import mednext, mednextmamba, mhsvm, msvmunet, vmunet
from .spec import NetworkSpec, Paper

#: Arguments that only networks with scans take.
SCAN_ARGUMENTS = ("d_state", "dt_init", "mixer", "routes", "ssm_mode")

NETWORKS: dict[str, NetworkSpec] = {
    spec.name: spec for spec in (mednext.SPEC, mednextmamba.SPEC, mhsvm.SPEC, msvmunet.SPEC, vmunet.SPEC)
}


def get_spec(name: str) -> NetworkSpec:
    """Registry entry of a network.

    Raises:
        KeyError: an unknown name; the message lists the known ones.
    """
    if name not in NETWORKS:
        raise KeyError(f"no network {name!r}; known: {', '.join(sorted(NETWORKS))}")
    return NETWORKS[name]


def create_network(
    name: str, input_channels: int, num_classes: int, *, strides: Sequence[Sequence[int]], **kwargs: Any
) -> nn.Module:
    """Build a network by name with its registered defaults.

    Args:
        name: key of ``NETWORKS``.
        input_channels: image channels.
        num_classes: segmentation classes including background.
        strides: per stage, per axis, as in nnU-Net's plans; two or three entries each.
        kwargs: further arguments of the network's builder.

    Raises:
        KeyError: an unknown network.
        ValueError: arguments of the scan for a network without one, or whatever the builder refuses.
    """
    spec = get_spec(name)
    surplus = [] if spec.has_scans else [argument for argument in SCAN_ARGUMENTS if argument in kwargs]
    if surplus:
        raise ValueError(f"{name} has no scans, so it takes no {', '.join(surplus)}")
    module, _, function = spec.build.rpartition(".")
    build = getattr(importlib.import_module(module), function)
    return build(input_channels, num_classes, strides=strides, **{**spec.defaults, **kwargs})


__all__ = ["NETWORKS", "SCAN_ARGUMENTS", "NetworkSpec", "Paper", "create_network", "get_spec"]
