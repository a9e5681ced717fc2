"""Every core beside convolutions of the same width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from medmamba.bench import volumes
from medmamba.bench.measure import CPU
from medmamba.bench.rows import Row
from medmamba.bench.volumes import LAYOUTS, YARDSTICK, Contender, VolumeCase, convolution
from medmamba.command import CommandError
from medmamba.mixers import CORES, get_core

#: What a core of a network with six routes and Mamba's sixteen states is built with; its own options at their defaults.
D_STATE, ROUTES, KERNEL = 16, "raster6", (3, 3, 3)
#: Widths and sizes that nnU-Net has at strides 2, 4 and 8 of a patch of 96 cubed.
CASES = (VolumeCase(64, (48, 48, 48)), VolumeCase(128, (24, 24, 24)), VolumeCase(256, (12, 12, 12)))
CONVOLUTIONS = (YARDSTICK, "depthwise 3x3x3", "depthwise 5x5x5")


def contenders(cores: Sequence[str]) -> list[Contender]:
    """Convolutions in both memory formats, the yardstick first, then cores by name."""
    return [
        *(convolution(name, layout) for layout in LAYOUTS for name in CONVOLUTIONS),
        *(Contender(name, "core", "tokens", partial(core, name)) for name in cores),
    ]


def core(name: str, case: VolumeCase) -> nn.Module:
    """A core as a network would build it on so many channels."""
    rank = math.ceil(case.channels / 16)
    return get_core(name)(case.channels, d_state=D_STATE, dt_rank=rank, routes=ROUTES, kernel_size=KERNEL)


def select(cores: Sequence[str] | None, pattern: str | None) -> tuple[list[str], list[VolumeCase]]:
    """Cores by name and cases by a part of their name; all without.

    Raises:
        CommandError: an unknown core, or no such case; the text lists the names.
    """
    for name in cores or []:
        if name not in CORES:
            raise CommandError(f"no core {name!r}; known: {', '.join(sorted(CORES))}")
    return list(cores or sorted(CORES)), volumes.choose(CASES, pattern)


def run(cores: Sequence[str], cases: Sequence[VolumeCase], seconds: float, device: torch.device = CPU) -> Iterator[Row]:
    """One row per case, contender and pass; arguments and errors as :func:`medmamba.bench.volumes.run`."""
    return volumes.run(contenders(cores), cases, seconds, device)
