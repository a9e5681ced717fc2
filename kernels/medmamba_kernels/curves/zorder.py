"""Z-order (Morton): bits of the three coordinates interleaved."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_coordinates(n0: int, n1: int, n2: int) -> tuple[list[Tensor], int]:
    """Coordinates of all voxels along the axes longer than 1, and the bits they need.

    Returns:
        list of (n0*n1*n2,) int64 tensors (empty for a single voxel), number of bits of the longest axis.
    """
    sizes = (n0, n1, n2)
    axes = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    coordinates = [axis.reshape(-1) for axis, n in zip(axes, sizes, strict=True) if n > 1]
    return coordinates, (max(sizes) - 1).bit_length()


def interleave(coordinates: list[Tensor], bits: int) -> Tensor:
    """Interleave the bits of the coordinates, first axis most significant; (L,) int64."""
    code = torch.zeros_like(coordinates[0])
    for bit in range(bits - 1, -1, -1):
        for axis in coordinates:
            code = (code << 1) | ((axis >> bit) & 1)
    return code


def order(n0: int, n1: int, n2: int) -> Tensor:
    """Voxels sorted by their Morton code; voxels outside the grid are skipped."""
    coordinates, bits = grid_coordinates(n0, n1, n2)
    if not coordinates:
        return torch.zeros(1, dtype=torch.int64)
    return torch.argsort(interleave(coordinates, bits))
