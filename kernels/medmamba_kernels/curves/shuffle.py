"""A fixed pseudo-random order: neighbours in the volume are strangers on the route.

The control for every question about order. The same on every machine and torch version: voxels are sorted by a
hash of their raster index (the finaliser of splitmix64: Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), not drawn from a generator.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order(n0: int, n1: int, n2: int) -> Tensor:
    """Voxels sorted by the hash of their index, ``(n0*n1*n2,)`` int64."""
    z = torch.arange(1, n0 * n1 * n2 + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return torch.argsort(z ^ _shift_right(z, 31), stable=True)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number: products wrap to the same bits."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: the sign bits that an arithmetic shift brings in are cleared."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
