"""Hilbert curve over the enclosing power-of-two cube; voxels outside the grid are skipped.

Neighbouring steps are one voxel on 2^m cubes (and 2^m squares when one axis has size 1); on other grids the
curve jumps where it leaves the volume. Axes of size 1 are dropped before the curve is built.

Source: J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707, 2004 (coordinates to transpose form).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .zorder import grid_coordinates, interleave


def _hilbert_transpose(coordinates: list[Tensor], bits: int) -> list[Tensor]:
    """Skilling's inverse-undo, then Gray encoding; the interleaved result is the position on the curve."""
    x = [axis.clone() for axis in coordinates]
    q = 1 << (bits - 1)
    while q > 1:
        low = q - 1
        for i in range(len(x)):
            is_set = (x[i] & q) != 0
            swap = (x[0] ^ x[i]) & low
            first = torch.where(is_set, x[0] ^ low, x[0] ^ swap)
            if i > 0:
                x[i] = torch.where(is_set, x[i], x[i] ^ swap)
            x[0] = first
        q >>= 1
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    parity = torch.zeros_like(x[0])
    q = 1 << (bits - 1)
    while q > 1:
        parity = torch.where((x[-1] & q) != 0, parity ^ (q - 1), parity)
        q >>= 1
    return [axis ^ parity for axis in x]


def order(n0: int, n1: int, n2: int) -> Tensor:
    """Voxels sorted by their position on the Hilbert curve, ``(n0*n1*n2,)`` int64."""
    coordinates, bits = grid_coordinates(n0, n1, n2)
    if not coordinates:
        return torch.zeros(1, dtype=torch.int64)
    return torch.argsort(interleave(_hilbert_transpose(coordinates, bits), bits))
