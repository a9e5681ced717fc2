"""Sliding window as a stream: a slab of the volume leaves as soon as no later tile can reach it.

Positions and weights of the tiles are those of nnU-Net (Isensee et al., "nnU-Net", Nature Methods 18, 2021): steps of
at most ``step`` times the tile, spread evenly, and a Gaussian with a sigma of an eighth of the tile around its centre.
Memory is K x tile depth x H x W values for K classes, whatever the depth of the volume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
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


def predict_slabs(
    image: Tensor, forward: Forward, *, tile: Sequence[int], step: float, classes: int
) -> Iterator[Tensor]:
    """Logits of a volume, slab by slab from the first plane to the last.

    Args:
        image: (C, D, H, W) float32, at least as large as the tile.
        forward: on one tile; its result may be on another device and in another float format.
        tile: (d, h, w), or (h, w) for a network of images, which sees one plane at a time.
        step: see :func:`tile_starts`.
        classes: K.

    Yields:
        (K, n, H, W) float32 on the CPU, n planes that nothing later changes; all n together are D. The memory is used
        again for the next slab, so use or copy it before asking for more.

    Raises:
        ValueError: an image smaller than the tile.
    """
    is_flat = len(tile) == 2
    depth, height, width = (1, *tile) if is_flat else tile
    if any(size < wanted for size, wanted in zip(image.shape[1:], (depth, height, width), strict=True)):
        raise ValueError(f"an image {tuple(image.shape[1:])} is smaller than the tile {tuple(tile)}; pad it first")
    starts = list(range(image.shape[1])) if is_flat else tile_starts(image.shape[1], depth, step)
    in_plane = [tile_starts(size, part, step) for size, part in zip(image.shape[2:], (height, width), strict=True)]
    weights = tile_weights(tuple(tile)).view(depth, height, width)
    # The planes start ... start + depth of sums; what leaves is shifted out at the front.
    total = torch.zeros(classes, depth, *image.shape[2:])
    weight = torch.zeros(depth, *image.shape[2:])
    for start, following in zip(starts, [*starts[1:], image.shape[1]], strict=True):
        for y, x in itertools.product(*in_plane):
            where = (slice(y, y + height), slice(x, x + width))
            part = image[:, start : start + depth, *where]
            logits = forward((part[:, 0] if is_flat else part)[None].contiguous())[0]
            total[:, :, *where] += logits.to("cpu", torch.float32).view(classes, depth, height, width) * weights
            weight[:, *where] += weights
        done = following - start
        yield total[:, :done] / weight[:done]
        for sums in (total, weight):
            kept = sums[..., done:, :, :].clone()
            sums[..., : depth - done, :, :] = kept
            sums[..., depth - done :, :, :] = 0


def with_mirroring(forward: Forward, axes: Sequence[int]) -> Forward:
    """The mean over all reflections along some spatial axes (0 is the first), as nnU-Net's test-time augmentation."""
    combinations = [
        [axis + 2 for axis in chosen]
        for count in range(len(axes) + 1)
        for chosen in itertools.combinations(sorted(axes), count)
    ]

    def mirrored(x: Tensor) -> Tensor:
        total = forward(x)
        for chosen in combinations[1:]:
            total = total + forward(x.flip(chosen)).flip(chosen)
        return total / len(combinations)

    return mirrored


def mean_of(forwards: Sequence[Forward]) -> Forward:
    """The mean over several networks, e.g. the folds of a model."""

    def averaged(x: Tensor) -> Tensor:
        total = forwards[0](x)
        for forward in forwards[1:]:
            total = total + forward(x)
        return total / len(forwards)

    return averaged
