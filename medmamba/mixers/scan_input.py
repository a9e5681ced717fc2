"""The size of what scans read: measured as a quantile, and limited.

A few values of a scan's input are far larger than all others, and the state carries what they write. Quamba (Chiang et
al., "Quamba: A Post-Training Quantization Recipe for Selective State Space Models", 2024, arXiv:2410.13229) clips it at
the 0.9995 to 0.99999 quantile before it is rounded to 8 bits. Here nothing but the clipping is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .scan import ScanCore

#: Bits of a float32 that make no difference to a bin: 10 bits of fraction are left, or a thousandth.
_DROPPED = 13
_BINS = 2 ** (31 - _DROPPED)


class MagnitudeCounts:
    """How many values of which size were seen, to a thousandth of the value; the order in which they came is forgotten.

    Attributes:
        total: number of values.
    """

    def __init__(self) -> None:
        self.total = 0
        self._bins = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor.

        Raises:
            ValueError: NaN or infinity.
        """
        sizes = x.detach().to("cpu", torch.float32).abs().flatten()
        if not bool(sizes.isfinite().all()):
            raise ValueError("the input of a scan is NaN or infinite; there is no quantile of that")
        # The bits of positive floats rise with them.
        self._bins += torch.bincount(sizes.view(torch.int32) >> _DROPPED, minlength=_BINS)
        self.total += sizes.numel()

    def quantile(self, share: float) -> float:
        """A value that at least this share of what was counted does not exceed, at most a thousandth above the least.

        Raises:
            ValueError: nothing was counted, or a share outside of (0, 1].
        """
        if not 0 < share <= 1 or not self.total:
            raise ValueError(f"no quantile {share} of {self.total} values; it needs a share above 0, at most 1")
        reached = self._bins.cumsum(0) >= math.ceil(share * self.total)
        highest = ((int(reached.to(torch.int8).argmax()) + 1) << _DROPPED) - 1
        return torch.tensor(highest, dtype=torch.int32).view(torch.float32).item()


def scan_names(network: nn.Module) -> list[str]:
    """Paths of the scans in a network."""
    return [name for name, module in network.named_modules() if isinstance(module, ScanCore)]


@contextmanager
def counted_scan_inputs(network: nn.Module) -> Iterator[dict[str, MagnitudeCounts]]:
    """Count what every scan reads in the forward passes within this context.

    Yields:
        path of the scan -> its counts.
    """
    counts = {name: MagnitudeCounts() for name in scan_names(network)}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(partial(_count, each)) for name, each in counts.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def clip_scan_inputs(network: nn.Module, limits: Mapping[str, float]) -> None:
    """From now on, every scan reads values of at most its limit, and of at least the negative of it.

    Args:
        network: it is changed, its weights and their names are not.
        limits: path of the scan -> limit above 0; every scan of the network and nothing else.

    Raises:
        ValueError: other names than those of the scans, or a limit that is not a number above 0.
    """
    if set(limits) != set(scan_names(network)):
        raise ValueError(f"limits are for {sorted(limits)}, and the scans are {scan_names(network)}")
    for name, limit in limits.items():
        if not 0 < limit < math.inf:
            raise ValueError(f"the limit of {name} is {limit}, expected a number above 0")
        network.get_submodule(name).register_forward_pre_hook(partial(_clip, limit))


def _count(counts: MagnitudeCounts, core: nn.Module, inputs: tuple[Any, ...]) -> None:
    counts.add(inputs[0])


def _clip(limit: float, core: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    u, *rest = inputs
    return u.clamp(-limit, limit), *rest
