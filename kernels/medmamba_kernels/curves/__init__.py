"""Space-filling curves: the order in which a grid is visited.

Every curve is a function ``(n0, n1, n2) -> LongTensor (n0*n1*n2,)``: entry ``p`` is the raster index
(``n2`` fastest) of the voxel visited at step ``p``. The axes are in *visiting* order, slowest first;
:class:`medmamba_kernels.routes.Route` maps them to the axes of the volume.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import diagonal, hilbert, raster, shuffle, snake, spiral, zorder

Curve = Callable[[int, int, int], Tensor]

CURVES: dict[str, Curve] = {
    "diagonal": diagonal.order,
    "hilbert": hilbert.order,
    "raster": raster.order,
    "shuffle": shuffle.order,
    "snake": snake.order,
    "spiral": spiral.order,
    "zorder": zorder.order,
}

# Curves that finish one line (the fastest axis) before the next one, and those that finish one plane first:
# only there does "reset the state at every line / plane" mean anything.
LINEWISE_CURVES = frozenset({"raster", "snake"})
PLANEWISE_CURVES = frozenset({"raster", "snake", "diagonal", "spiral"})
