"""Diagonal snake in every plane (MHS-VM's pattern X, Ji 2024), planes chained end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from ._planes import chain_planes


def order(n0: int, n1: int, n2: int) -> Tensor:
    """Anti-diagonals i + j = 0, 1, 2, ...: even ones with i falling, odd ones with i rising."""
    i = torch.arange(n1).view(-1, 1).expand(n1, n2)
    j = torch.arange(n2).view(1, -1).expand(n1, n2)
    diagonal = i + j
    along = torch.where(diagonal % 2 == 0, n1 - 1 - i, i)
    return chain_planes(torch.argsort((diagonal * n1 + along).reshape(-1)), n0)
