"""Clockwise inward spiral in every plane (MHS-VM's pattern S, Ji 2024), planes chained end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from ._planes import chain_planes


def _rings(n1: int, n2: int) -> list[Tensor]:
    index_12 = torch.arange(n1 * n2).view(n1, n2)
    parts = []
    for ring in range((min(n1, n2) + 1) // 2):
        top, bottom, left, right = ring, n1 - 1 - ring, ring, n2 - 1 - ring
        parts.append(index_12[top, left : right + 1])
        parts.append(index_12[top + 1 : bottom + 1, right])
        if bottom > top:
            parts.append(index_12[bottom, left:right].flip(0))
        if right > left:
            parts.append(index_12[top + 1 : bottom, left].flip(0))
    return parts


def order(n0: int, n1: int, n2: int) -> Tensor:
    """Inward from the corner (0, 0) along the first line; every other plane runs outward."""
    return chain_planes(torch.cat(_rings(n1, n2)), n0)
