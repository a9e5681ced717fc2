"""Sliding window as a stream: a slab of the volume leaves as soon as no later tile can reach it.

Positions and weights of the tiles are those of nnU-Net (Isensee et al., "nnU-Net", Nature Methods 18, 2021): steps of
at most ``step`` times the tile, spread evenly, and a Gaussian with a sigma of an eighth of the tile around its centre.
Memory is K x tile depth x H x W values for K classes, whatever the depth of the volume; where that is too much, some of
the rows at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

#: (1, C, *tile) -> (1, K, *tile) logits.
Forward = Callable[[Tensor], Tensor]


def tile_starts(size: int, tile: int, step: float) -> list[int]:
    """First voxels of the tiles along one axis, as nnU-Net places them.

    Args:
        size: of the axis, at least ``tile``.
        tile: of the tile.
        step: largest distance between tiles over ``tile``, in (0, 1].
    """
    count = math.ceil((size - tile) / (tile * step)) + 1
    distance = (size - tile) / (count - 1) if count > 1 else 0.0
    return [int(np.round(distance * i)) for i in range(count)]


@lru_cache(maxsize=4)
def tile_weights(tile: tuple[int, ...]) -> Tensor:
    """nnU-Net's Gaussian importance of the voxels of a tile, float32, nowhere 0; the largest is 10."""
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros(tile)
    impulse[tuple(size // 2 for size in tile)] = 1
    weights = gaussian_filter(impulse, [size / 8 for size in tile], 0, mode="constant", cval=0)
    # float16 as nnU-Net has them: what is 0 there gets the smallest value that is not.
    rounded = torch.from_numpy(weights / weights.max() * 10).to(torch.float16)
    rounded[rounded == 0] = rounded[rounded > 0].min()
    return rounded.to(torch.float32)


@dataclass(frozen=True)
class Skip:
    """Which tiles are not computed.

    A tile of empty voxels alone is skipped. It has no weight: where another tile covers a voxel, that one decides, and
    where none does, ``background`` stands. So the rule never overrules a network that looked, it only speaks where
    nobody did, and all of its voxels are empty ones.

    Attributes:
        empty: (D, H, W) bool; see :func:`.air.empty_voxels`.
        background: (K,) float32, logits of a voxel that no computed tile covers.
    """

    empty: Tensor
    background: Tensor


def predict_slabs(
    image: Tensor,
    forward: Forward,
    *,
    tile: Sequence[int],
    step: float,
    classes: int,
    rows: slice | None = None,
    skip: Skip | None = None,
) -> Iterator[Tensor]:
    """Logits of a volume, slab by slab from the first plane to the last.

    Args:
        image: (C, D, H, W) float32, at least as large as the tile.
        forward: on one tile; its result may be on another device and in another float format.
        tile: (d, h, w), or (h, w) for a network of images, which sees one plane at a time.
        step: see :func:`tile_starts`.
        classes: K.
        rows: the part of H that is wanted, with start and stop; None: all. Tiles that reach into it are computed
            whole, and its logits are those that the whole volume has there, bit for bit.
        skip: which tiles to leave out; None: none.

    Yields:
        (K, n, rows, W) float32 on the CPU, n planes that nothing later changes; all n together are D. The memory is
        used again for the next slab, so use or copy it before asking for more.

    Raises:
        ValueError: an image smaller than the tile.
    """
    is_flat = len(tile) == 2
    depth, height, width = (1, *tile) if is_flat else tile
    if any(size < wanted for size, wanted in zip(image.shape[1:], (depth, height, width), strict=True)):
        raise ValueError(f"an image {tuple(image.shape[1:])} is smaller than the tile {tuple(tile)}; pad it first")
    rows = rows or slice(0, image.shape[2])
    starts, down, across = _starts(image.shape[1:], tile, step)
    down = [y for y in down if y < rows.stop and y + height > rows.start]
    sums = _Sums(classes, depth, rows, image.shape[3], tile_weights(tuple(tile)).view(depth, height, width))
    for start, following in zip(starts, [*starts[1:], image.shape[1]], strict=True):
        planes = slice(start, start + depth)
        for y, x in itertools.product(down, across):
            place = (planes, slice(y, y + height), slice(x, x + width))
            if skip is not None and skip.empty[place].all():
                continue
            part = image[:, *place]
            logits = forward((part[:, 0] if is_flat else part)[None].contiguous())[0]
            sums.add(logits.view(classes, depth, height, width), y, x)
        yield sums.means(following - start, None if skip is None else skip.background)
        sums.advance(following - start)


def count_tiles(shape: Sequence[int], tile: Sequence[int], step: float) -> int:
    """Tiles of a window over an image (D, H, W); arguments as for :func:`predict_slabs`."""
    return math.prod(map(len, _starts(shape, tile, step)))


def _starts(shape: Sequence[int], tile: Sequence[int], step: float) -> list[list[int]]:
    """First voxels of the tiles along D, H and W."""
    if len(tile) == 2:
        return [list(range(shape[0])), *(tile_starts(*sizes, step) for sizes in zip(shape[1:], tile, strict=True))]
    return [tile_starts(*sizes, step) for sizes in zip(shape, tile, strict=True)]


class _Sums:
    """Weighted logits of the planes that tiles reach at present. One class at a time, so copies are small.

    Products and sums are rounded one by one, so that a voxel has the same bits wherever its row lies in memory.
    """

    def __init__(self, classes: int, depth: int, rows: slice, width: int, weights: Tensor) -> None:
        self.rows, self.weights = rows, weights
        self.total = torch.zeros(classes, depth, rows.stop - rows.start, width)
        self.weight = torch.zeros(self.total.shape[1:])

    def add(self, logits: Tensor, y: int, x: int) -> None:
        """Add a tile (K, d, h, w) that begins at a row and a column of the volume."""
        _, height, width = self.weights.shape
        first, last = max(y, self.rows.start), min(y + height, self.rows.stop)
        inside = (slice(None), slice(first - y, last - y))
        where = (slice(None), slice(first - self.rows.start, last - self.rows.start), slice(x, x + width))
        weights = self.weights[inside]
        for total, channel in zip(self.total, logits.to("cpu", torch.float32), strict=True):
            total[where] += channel[inside] * weights
        self.weight[where] += weights

    def means(self, planes: int, background: Tensor | None) -> Tensor:
        """Logits (K, planes, rows, W) of the first planes, in the memory of their sums."""
        done, weight = self.total[:, :planes], self.weight[:planes]
        done /= weight
        if background is not None:
            nowhere = weight == 0
            for channel, value in zip(done, background.tolist(), strict=True):
                channel.masked_fill_(nowhere, value)
        return done

    def advance(self, planes: int) -> None:
        """Forget the first planes and make room for as many at the end."""
        for sums in (*self.total, self.weight):
            kept = sums[planes:].clone()
            sums[: len(kept)] = kept
            sums[len(kept) :] = 0


def with_mirroring(forward: Forward, axes: Sequence[int]) -> Forward:
    """The mean over all reflections along some spatial axes (0 is the first), as nnU-Net's test-time augmentation."""
    combinations = [
        [axis + 2 for axis in chosen]
        for count in range(len(axes) + 1)
        for chosen in itertools.combinations(sorted(axes), count)
    ]

    def mirrored(x: Tensor) -> Tensor:
        total = forward(x).clone()
        for chosen in combinations[1:]:
            total += forward(x.flip(chosen)).flip(chosen)
        return total.div_(len(combinations))

    return mirrored


def mean_of(forwards: Sequence[Forward]) -> Forward:
    """The mean over several networks, e.g. the folds of a model."""
    if len(forwards) == 1:
        return forwards[0]

    def averaged(x: Tensor) -> Tensor:
        total = forwards[0](x).clone()
        for forward in forwards[1:]:
            total += forward(x)
        return total.div_(len(forwards))

    return averaged
