"""Chains a curve of one plane through all planes so that the ends meet."""

from __future__ import annotations

import torch
from torch import Tensor


def chain_planes(plane_order: Tensor, n0: int) -> Tensor:
    """Repeat a plane's order over ``n0`` planes, every other plane backwards.

    Args:
        plane_order: (n1*n2,) int64, order within one plane.
        n0: number of planes.

    Returns:
        (n0*n1*n2,) int64; the step from one plane to the next is one voxel.
    """
    size = plane_order.numel()
    order_02 = plane_order.repeat(n0, 1)
    order_02[1::2] = order_02[1::2].flip(1)
    return (order_02 + size * torch.arange(n0).view(-1, 1)).reshape(-1)
