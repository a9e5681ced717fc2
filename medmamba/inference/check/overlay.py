"""Pictures of label maps that do not lie where their image lies: by their header, and by their array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmamba.inference.preview import write_preview
from medmamba.inference.reading import Image, read_image


@dataclass(frozen=True)
class Overlays:
    """Draws label maps over their images.

    Attributes:
        folder: of the pictures.
        images: first channel by id of its case.
        volume, prefer: as they are read, see ``Reading``.
    """

    folder: Path
    images: Mapping[str, Path]
    volume: int | None = None
    prefer: Literal["sform", "qform"] = "sform"

    def draw(self, case: str, label: Image) -> list[Path]:
        """Write ``CASE_by_header.png``, and, where both arrays have one shape, ``CASE_by_array.png``.

        Which of them follows the anatomy says what is wrong: the array, or the header.

        Raises:
            ImageRefused: the image cannot be read.
            OSError: a picture cannot be written.
        """
        image = read_image(self.images[case], volume=self.volume, prefer=self.prefer)
        drawn = {"header": placed(label, image)}
        if label.values.shape == image.values.shape:
            drawn["array"] = label.values
        names = {int(value): f"label {value:g}" for value in np.unique(label.values) if value > 0}
        paths = []
        for kind, labels in drawn.items():
            paths.append(self.folder / f"{case}_by_{kind}.png")
            write_preview(paths[-1], image, labels, names)
        return paths


def placed(label: Image, image: Image) -> NDArray[Any]:
    """A label map on the grid of an image, by the positions that both headers give; nearest neighbour, 0 outside.

    Args:
        label: whose ``values`` are (D, H, W).
        image: whose grid is wanted.

    Returns:
        (D, H, W) of the image, dtype of the label map.
    """
    from scipy.ndimage import affine_transform

    to_label = np.linalg.inv(label.affine) @ image.affine  # index (w, h, d) of the image to that of the label map
    matrix, offset = to_label[:3, :3][::-1, ::-1], to_label[:3, 3][::-1]
    result: NDArray[Any] = affine_transform(
        label.values, matrix, offset=offset, output_shape=image.values.shape, order=0, mode="grid-constant", cval=0
    )
    return result
