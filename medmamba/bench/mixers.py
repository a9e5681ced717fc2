"""One block of every published mixer beside a full convolution of the same width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from medmamba.bench import volumes
from medmamba.bench.measure import CPU
from medmamba.bench.rows import Row
from medmamba.bench.volumes import Contender, VolumeCase
from medmamba.command import CommandError
from medmamba.layers import Place
from medmamba.mixers import RoutedScan, get_core
from medmamba.mixers.block import mixer_builder
from medmamba.presets import MIXERS
from medmamba_kernels.backends import assume_backend
from medmamba_kernels.routes import Grid

#: The two finest stages with blocks of a network, in this order.
CASES = (VolumeCase(64, (24, 24, 24)), VolumeCase(128, (12, 12, 12)))


class Block(nn.Module):
    """A block of a mixer on tokens.

    Args:
        mixer: its name.
        channels: of the block.
        depth: of its stage; all axes are alike and halved towards the next.
    """

    def __init__(self, mixer: str, channels: int, depth: int):
        super().__init__()
        place = Place((3, 3, 3), (2, 2, 2), (2 ** (depth + 2),) * 3, depth=depth)
        self.block = mixer_builder(MIXERS[mixer].block, get_core)(channels, place=place)

    def forward(self, u: Tensor, grid: Grid) -> Tensor:
        y: Tensor = self.block(u.unflatten(1, grid))
        return y.flatten(1, 3)


def contenders(mixers: Sequence[str]) -> list[Contender]:
    """The yardstick in both memory formats, then mixers by name."""
    blocks = (Contender(name, "mixer", "tokens", partial(_block, name)) for name in mixers)
    return [*volumes.yardsticks(), *blocks]


def _block(mixer: str, case: VolumeCase) -> Block:
    return Block(mixer, case.channels, depth=CASES.index(case) if case in CASES else 0)


def select(mixers: Sequence[str] | None, pattern: str | None) -> tuple[list[str], list[VolumeCase]]:
    """Mixers by name and cases by a part of their name; all without.

    Raises:
        CommandError: an unknown mixer, or no such case; the text lists the names.
    """
    for name in mixers or []:
        if name not in MIXERS:
            raise CommandError(f"no mixer {name!r}; known: {', '.join(sorted(MIXERS))}")
    return list(mixers or sorted(MIXERS)), volumes.choose(CASES, pattern)


def run(
    mixers: Sequence[str], cases: Sequence[VolumeCase], seconds: float, device: torch.device = CPU
) -> Iterator[Row]:
    """One row per case, contender and pass; arguments and errors as :func:`medmamba.bench.volumes.run`."""
    return volumes.run(contenders(mixers), cases, seconds, device, facts=_scans)


def _scans(case: VolumeCase, module: nn.Module) -> Row:
    tokens, elements = scanned(module, case) if isinstance(module, Block) else ("", "")
    return {"scan_tokens": tokens, "scan_elements": elements}


def scanned(block: nn.Module, case: VolumeCase) -> tuple[int, int]:
    """Tokens x routes, and tokens x routes x channels, of all scans of a block in one pass, from a run without data."""
    tokens, elements = [], []

    def count(core: RoutedScan, inputs: tuple[Tensor, Grid]) -> None:
        _, length, channels = inputs[0].shape
        tokens.append(length * len(core.routes))
        elements.append(tokens[-1] * channels)

    hooks = [m.register_forward_pre_hook(count) for m in block.modules() if isinstance(m, RoutedScan)]
    meta = {name: tensor.to("meta") for name, tensor in block.state_dict().items()}
    try:
        with assume_backend("torch"), torch.no_grad():
            arguments = (torch.empty(1, case.length, case.channels, device="meta"), case.grid)
            functional_call(block, meta, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(tokens), sum(elements)
