"""Raster: lines in one direction, planes in one direction."""

from __future__ import annotations

import torch
from torch import Tensor


def order(n0: int, n1: int, n2: int) -> Tensor:
    """Visiting order of a raster scan, ``(n0*n1*n2,)`` int64."""
    return torch.arange(n0 * n1 * n2)
