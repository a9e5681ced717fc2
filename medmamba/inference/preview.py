"""A picture of one case, to look at two hundred results in ten minutes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .orientation import to_canonical
from .picture import Panel, draw_picture
from .reading import Image

#: Larger volumes are shown with every second, third, ... voxel along an axis.
_MOST_VOXELS = 256


def write_preview(path: Path, image: Image, labels: NDArray[Any], names: Mapping[int, str]) -> None:
    """Write image and labels in three planes through the centre of what was found, as PNG, atomically.

    Args:
        path: the file; its folder is made.
        image: whose ``values`` are (D, H, W).
        labels: (D, H, W) uint8 or uint16, on its grid.
        names: of the labels by value; 0 is the background.

    Raises:
        OSError: the file cannot be written.
    """
    values, orientation = to_canonical(image.values, image.affine)
    turned = orientation.apply(labels)
    steps = [-(-size // _MOST_VOXELS) for size in values.shape]
    spacing = np.linalg.norm(orientation.affine[:3, :3], axis=0)[::-1]
    # The picture wants rows to run to the back and columns to the left; canonical arrays run to the front and right.
    shown = tuple(slice(None, None, step if axis == 0 else -step) for axis, step in enumerate(steps))
    depth, height, width = (float(size) * step for size, step in zip(spacing, steps, strict=True))
    panel = Panel("", values[shown], None, turned[shown], (depth, height, width))
    path.parent.mkdir(exist_ok=True)
    draw_picture(path, [panel], {name: value for value, name in names.items() if value}, {}, dpi=100)
