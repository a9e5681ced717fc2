"""Snake (boustrophedon): every other line and every other plane runs backwards, each step is one voxel."""

from __future__ import annotations

import torch
from torch import Tensor


def order(n0: int, n1: int, n2: int) -> Tensor:
    """Visiting order of a snake through planes and lines, ``(n0*n1*n2,)`` int64."""
    index_012 = torch.arange(n0 * n1 * n2).view(n0, n1, n2).clone()
    index_012[1::2] = index_012[1::2].flip(1)
    # Lines alternate along the whole path, not per plane: with an odd number of lines the next plane
    # starts where the last line ended.
    lines_L2 = index_012.view(n0 * n1, n2)
    lines_L2[1::2] = lines_L2[1::2].flip(1)
    return lines_L2.reshape(-1)
