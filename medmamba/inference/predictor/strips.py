"""How many rows of a volume are predicted at a time, so that the sums of logits fit into memory.

The sums of a slab are K x tile depth x H x W values: 118 classes, a tile of 128 cubed and planes of 512 x 512 are 15.8
GB. Where that is too much, the volume is predicted in strips of rows, each from its first plane to its last. Tiles
across the border of two strips are computed for both, with a step of 0.5 two rows of tiles per border, of seven in this
example: two strips take 9/7 of the time, three 11/7. The labels are the same to the bit.

The alternative, sums in a file, costs no forward pass. It wants a disk, and where a container gives one that is none
(a tmpfs) it takes the very memory that it is to save; and a full disk would end the process.
"""

from __future__ import annotations

import itertools

from medmamba.inference.machine import available_bytes, resident_bytes

from .resample import AxisMap

#: Of the memory that is left after preprocessing; the rest is for the network and for the logits of its tile.
_SHARE = 0.5
#: Rows of the thinnest strip over those of a tile: below, a network's own logits need more memory than their sums.
_THINNEST = 0.5


def divide_rows(
    rows: AxisMap, tile_rows: int, row_bytes: int, max_ram_bytes: int | None = None
) -> list[tuple[slice, slice]]:
    """The fewest strips whose sums fit.

    Args:
        rows: map of the rows of logits to those of the result.
        tile_rows: height of a tile.
        row_bytes: sums of one row.
        max_ram_bytes: what this process may hold in all; None: as much as it can get. In this case the thinnest strips
            are tried also where they seem too large.

    Returns:
        per strip, its rows of the result and the rows of logits that they need.

    Raises:
        MemoryError: ``max_ram_bytes`` is too little.
    """
    left = available_bytes() if max_ram_bytes is None else max_ram_bytes - (resident_bytes() or 0)
    if left is None:
        return _strips(rows, 1)
    most_rows = int(left * _SHARE / row_bytes)
    thinnest = max(2, int(tile_rows * _THINNEST))  # two: a row between two others needs both
    if most_rows < thinnest and max_ram_bytes is not None:
        needed = max_ram_bytes - left + thinnest * row_bytes / _SHARE
        raise MemoryError(
            f"{max_ram_bytes / 1e9:.3g} GB of memory are too little for this image and model: at least "
            f"{needed / 1e9:.3g} GB are needed; allow more, or predict on a machine that has more"
        )
    size = int(rows.high[-1]) + 1
    if size <= most_rows:
        return _strips(rows, 1)
    for count in range(2, len(rows.low) + 1):
        strips = _strips(rows, count)
        if max(needed.stop - needed.start for _, needed in strips) <= max(most_rows, thinnest):
            return strips
    return _strips(rows, 1)


def _strips(rows: AxisMap, count: int) -> list[tuple[slice, slice]]:
    bounds = [len(rows.low) * i // count for i in range(count + 1)]
    wanted = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return [(each, rows.part(each)[0]) for each in wanted]
