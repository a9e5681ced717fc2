"""Resampling of logits to the image's own grid as nnU-Net does it, plane by plane.

nnU-Net resamples logits linearly (skimage's ``resize``, order 1, edge values repeated) or, where one axis is three
times coarser than the finest, linearly in its planes and to the nearest plane along it. Both are a weighted sum of at
most two neighbours per axis, so a plane of the result needs two planes of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: An axis this much coarser than the finest one is resampled by itself, as in nnU-Net.
_ANISOTROPIC = 3


@dataclass(frozen=True)
class AxisMap:
    """Where the values along one axis of the result come from: ``(1 - share) * x[low] + share * x[high]``.

    Attributes:
        low: (n,) int64.
        high: (n,) int64.
        share: (n,) float32 in [0, 1].
    """

    low: Tensor
    high: Tensor
    share: Tensor

    @classmethod
    def linear(cls, size: int, target: int) -> AxisMap:
        """Linear between the centres of voxels, ``size`` of them to ``target``; constant outside."""
        place = np.clip((np.arange(target) + 0.5) * size / target - 0.5, 0, size - 1)
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, size - 1)
        return cls(torch.from_numpy(low), torch.from_numpy(high), torch.from_numpy(place - low).to(torch.float32))

    @classmethod
    def nearest(cls, size: int, target: int) -> AxisMap:
        """The nearest voxel; of two that are equally near the later one, as scipy's ``map_coordinates``."""
        place = (np.arange(target) + 0.5) * size / target - 0.5
        low = torch.from_numpy(np.clip(np.floor(place + 0.5), 0, size - 1).astype(np.int64))
        return cls(low, low, torch.zeros(target))

    @property
    def is_identity(self) -> bool:
        return bool((self.share == 0).all()) and torch.equal(self.low, torch.arange(len(self.low)))

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """Along one axis of a tensor."""
        if self.is_identity:
            return x
        shape = [1] * x.dim()
        shape[axis] = -1
        return torch.lerp(x.index_select(axis, self.low), x.index_select(axis, self.high), self.share.view(shape))


def axis_maps(
    shape: Sequence[int], target: Sequence[int], spacing: Sequence[float], target_spacing: Sequence[float]
) -> list[AxisMap]:
    """The three maps with which nnU-Net's default resampling of logits reads a grid.

    Args:
        shape: (D, H, W) of the logits.
        target: (D, H, W) of the result.
        spacing: of the logits, in any unit.
        target_spacing: of the result.
    """
    alone = _axis_alone(spacing, target_spacing)
    return [
        AxisMap.nearest(size, wanted) if axis == alone else AxisMap.linear(size, wanted)
        for axis, (size, wanted) in enumerate(zip(shape, target, strict=True))
    ]


def _axis_alone(spacing: Sequence[float], target_spacing: Sequence[float]) -> int | None:
    """The one axis that is resampled by itself, from the logits' spacing or else from the result's."""
    for sizes in (spacing, target_spacing):
        if max(sizes) / min(sizes) > _ANISOTROPIC:
            coarsest = [axis for axis, size in enumerate(sizes) if size == max(sizes)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def resample_slabs(slabs: Iterable[Tensor], maps: Sequence[AxisMap]) -> Iterator[Tensor]:
    """Slabs of a volume to slabs of the result, in order.

    Args:
        slabs: (K, n, H, W) each, all planes of the source in order.
        maps: of D, H, W.

    Yields:
        (K, m, *target plane), all planes of the result in order; nothing where a slab completes none.
    """
    along, rows, columns = maps
    kept: Tensor | None = None  # the last plane that is still needed, resampled within
    first, done = 0, 0  # number of the first plane in hand; planes of the result that are out
    for slab in slabs:
        inside = columns.apply(rows.apply(slab, 2), 3)
        planes = inside if kept is None else torch.cat([kept, inside], 1)
        last = first + planes.shape[1] - 1
        ready = int(torch.searchsorted(along.high, last, right=True))
        if ready > done:
            part = slice(done, ready)
            low, high = along.low[part] - first, along.high[part] - first
            share = along.share[part].view(1, -1, 1, 1)
            yield torch.lerp(planes.index_select(1, low), planes.index_select(1, high), share)
            done = ready
        kept = planes[:, -1:].clone()
        first = last
