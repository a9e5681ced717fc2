"""Where in a network a block stands: all that it may know of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Place:
    """One stage of a network, as its blocks see it; one entry per axis of the image (two or three).

    Attributes:
        kernel_size: of the plan's convolutions here. 1 on an axis is nnU-Net's word for "too thick to look along":
            its spacing is twice the smallest or more.
        pool: stride to the next coarser stage, ones at the coarsest. nnU-Net pools an axis if its spacing is less than
            twice the smallest and at least eight voxels are left, so this is its rule for every other reduction too.
        scale: total stride from the image down to here.
        depth: stages with blocks that lie above this one, 0 for the finest of them.
        is_deepest: whether this is the coarsest stage of the network.
    """

    kernel_size: tuple[int, ...]
    pool: tuple[int, ...]
    scale: tuple[int, ...]
    depth: int = 0
    is_deepest: bool = False

    @property
    def ndim(self) -> int:
        """Axes of the image."""
        return len(self.kernel_size)

    def kernel(self, size: int) -> tuple[int, ...]:
        """A kernel of this size along every axis that convolutions look along here, 1 along the others."""
        return tuple(size if k > 1 else 1 for k in self.kernel_size)


def places(
    strides: Sequence[Sequence[int]], kernels: Sequence[Sequence[int]], first: int = 0, skipped: int = 0
) -> list[Place]:
    """The places of all stages.

    Args:
        strides: per stage and axis, as in nnU-Net's plans.
        kernels: per stage and axis.
        first: first stage with blocks; ``depth`` counts from it.
        skipped: stages at the front that get no place.
    """
    ndim, last = len(strides[0]), len(strides) - 1
    found = []
    for i, kernel in enumerate(kernels):
        pool = tuple(strides[i + 1]) if i < last else (1,) * ndim
        scale = tuple(prod(stride[axis] for stride in strides[: i + 1]) for axis in range(ndim))
        found.append(Place(tuple(kernel), pool, scale, max(0, i - first), i == last))
    return found[skipped:]
