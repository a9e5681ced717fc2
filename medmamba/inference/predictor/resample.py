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
#: Logits of the result that are made at a time.
BLOCK = 2**19


@dataclass(frozen=True)
class AxisMap:
    """Where the values along one axis of the result come from: ``(1 - share) * x[low] + share * x[high]``.

    Attributes:
        low: (n,) int64, ascending.
        high: (n,) int64, ascending; ``low`` where the share is 0.
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
        share = (place - low).astype(np.float32)
        high = np.where(share > 0, np.minimum(low + 1, size - 1), low)
        return cls(torch.from_numpy(low), torch.from_numpy(high), torch.from_numpy(share))

    @classmethod
    def nearest(cls, size: int, target: int) -> AxisMap:
        """The nearest voxel; of two that are equally near the later one, as scipy's ``map_coordinates``."""
        place = (np.arange(target) + 0.5) * size / target - 0.5
        low = torch.from_numpy(np.clip(np.floor(place + 0.5), 0, size - 1).astype(np.int64))
        return cls(low, low, torch.zeros(target))

    @property
    def is_identity(self) -> bool:
        return bool((self.share == 0).all()) and torch.equal(self.low, torch.arange(len(self.low)))

    def part(self, wanted: slice) -> tuple[slice, AxisMap]:
        """What a part of the result needs of the source, and the map from there."""
        low, high = self.low[wanted], self.high[wanted]
        needed = slice(int(low[0]), int(high[-1]) + 1)
        return needed, AxisMap(low - needed.start, high - needed.start, self.share[wanted])

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


def resample_slabs(slabs: Iterable[Tensor], maps: Sequence[AxisMap]) -> Iterator[tuple[int, slice, Tensor]]:
    """Slabs of a volume to the result, a few rows of a plane at a time: what is in hand stays in the cache.

    Args:
        slabs: (K, n, H, W) each, all planes of the source in order.
        maps: of D, H, W.

    Yields:
        number of a plane of the result, some of its rows, and their logits (K, rows, W); all of them in order.
    """
    along, rows, columns = maps
    blocks: list[tuple[slice, slice, AxisMap]] | None = None
    kept: list[Tensor] = []  # the last plane, which the next one may need
    first, done = 0, 0  # number of the first plane in hand; planes of the result that are out
    for slab in slabs:
        blocks = blocks or list(_blocks(rows, len(slab) * len(columns.low)))
        planes = [*kept, *slab.unbind(1)]
        last = first + len(planes) - 1
        ready = int(torch.searchsorted(along.high, last, right=True))
        for plane in range(done, ready):
            low, high = planes[along.low[plane] - first], planes[along.high[plane] - first]
            share = float(along.share[plane])
            for wanted, needed, map_of_rows in blocks:
                x = torch.lerp(low[:, needed], high[:, needed], share) if share else low[:, needed]
                yield plane, wanted, columns.apply(map_of_rows.apply(x, 1), 2)
        kept, first, done = [planes[-1].clone()], last, ready


def _blocks(rows: AxisMap, row_size: int) -> Iterator[tuple[slice, slice, AxisMap]]:
    """Rows of the result, the rows of the source that they need, and their map."""
    step = max(1, BLOCK // row_size)
    for start in range(0, len(rows.low), step):
        wanted = slice(start, min(start + step, len(rows.low)))
        yield wanted, *rows.part(wanted)
