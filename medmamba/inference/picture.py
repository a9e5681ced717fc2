"""One picture: three planes through each predicted volume, with prediction and, if any, reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from medmamba.files import write_atomically
from medmamba.palette import COLOURS

#: Structures named in the legend; a dataset with fifty would cover the picture.
MAX_NAMED = 8

PLANES = ("axial", "coronal", "sagittal")

#: Directions at the top, bottom, left and right of each plane: anterior, posterior, superior, inferior, right, left.
_LETTERS = {"axial": "APRL", "coronal": "SIRL", "sagittal": "SIAP"}

# Inches.
_CELL, _MAX_CELL_HEIGHT, _LEFT, _TOP, _GAP, _SPLIT = 3.2, 3.4, 0.36, 0.3, 0.12, 0.04


#: Left, right, bottom and top of a plane in mm; top is 0.
Extent = tuple[float, float, float, float]


@dataclass(frozen=True)
class Panel:
    """One predicted volume, turned so that D runs to the head, H to the back and W to the patient's left.

    Attributes:
        title: beside the volume's row.
        image: (D, H, W), any number type.
        reference: label map of the same shape; None where nobody knows.
        prediction: label map of the same shape.
        spacing_mm: voxel size along D, H, W.
    """

    title: str
    image: NDArray[Any]
    reference: NDArray[Any] | None
    prediction: NDArray[Any]
    spacing_mm: tuple[float, float, float]


def draw_picture(
    path: Path,
    panels: Sequence[Panel],
    structures: Mapping[str, int | list[int]],
    captions: Mapping[str, str],
    *,
    footer: str = "",
    dpi: int = 160,
) -> None:
    """Write the picture as PNG: one row per volume, a column for image, reference and prediction, three planes each.

    The planes go through the centre of the reference, or else of the prediction, and have one scale in mm per volume.
    The picture is cut to the surroundings of the structures. Without any reference there is no column for it.

    Args:
        path: the file; a reader never sees half of it.
        panels: one per volume, from top to bottom.
        structures: name to label or labels.
        captions: text behind a structure's name in the legend, such as its Dice.
        footer: small print, for licence and source.
        dpi: pixels per inch.

    Raises:
        ValueError: no panel, or arrays of one panel differ in shape.
        OSError: the file cannot be written.
    """
    if not panels:
        raise ValueError("a picture needs at least one volume")
    views = [_View(panel) for panel in panels]
    has_reference = any(panel.reference is not None for panel in panels)
    kinds = ("image", "reference", "prediction") if has_reference else ("image", "prediction")
    bottom = 0.42 + 0.2 * bool(footer)
    width = _LEFT + len(kinds) * _CELL + (len(kinds) - 1) * _GAP + _GAP
    height = _TOP + sum(view.cell_height for view in views) + (len(views) - 1) * _GAP + bottom
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="black")
    FigureCanvasAgg(figure)
    y = height - _TOP
    for column, kind in enumerate(kinds):
        x = _LEFT + column * (_CELL + _GAP) + _CELL / 2
        figure.text(x / width, (y + 0.07) / height, kind, color="white", fontsize=10, ha="center", va="bottom")
    for view in views:
        for column, kind in enumerate(kinds):
            _draw_cell(figure, view, kind, structures, x=_LEFT + column * (_CELL + _GAP), y=y)
        middle = (y - view.cell_height / 2) / height
        figure.text(0.07 / width, middle, view.panel.title, color="white", fontsize=9, rotation=90, va="center")
        y -= view.cell_height + _GAP
    _draw_legend(figure, structures, captions, has_reference, y=(0.04 + 0.2 * bool(footer)) / height)
    if footer:
        figure.text(0.5, 0.07 / height, footer, color="0.6", fontsize=6.5, ha="center", va="bottom")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", facecolor="black"))


class _View:
    """What of a volume is shown: the three planes, and the part of each around the structures."""

    def __init__(self, panel: Panel) -> None:
        arrays = {"image": panel.image, "reference": panel.reference, "prediction": panel.prediction}
        shapes = {name: array.shape for name, array in arrays.items() if array is not None}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"{panel.title}: {found} differ in shape")
        self.panel = panel
        predicted = panel.prediction > 0
        expected = predicted if panel.reference is None else panel.reference > 0
        foreground = expected if expected.any() else predicted
        everything = expected | predicted
        self.centre = _centre(foreground)
        self.box = _box_with_margin(everything, panel.spacing_mm)
        depth, height, width = (
            (part.stop - part.start) * size for part, size in zip(self.box, panel.spacing_mm, strict=True)
        )
        self.size_mm = {"axial": (width, height), "coronal": (width, depth), "sagittal": (height, depth)}
        # Axial on the left, coronal over sagittal on the right, all in the same scale.
        row_mm, column_mm = width + max(width, height), max(height, 2 * depth)
        self.inches_per_mm = min((_CELL - _SPLIT) / row_mm, (_MAX_CELL_HEIGHT - _SPLIT) / column_mm)
        self.cell_height = self.inches_per_mm * column_mm + _SPLIT
        low, high = np.percentile(panel.image, (0.5, 99.5))
        self.window = (float(low), float(max(high, np.nextafter(low, np.inf))))

    def plane(self, array: NDArray[Any], plane: str) -> NDArray[Any]:
        """One plane, rows from top to bottom as they are shown."""
        shown, (k, j, i) = (
            array[self.box],
            [c - part.start for c, part in zip(self.centre, self.box, strict=True)],
        )
        if plane == "axial":
            return shown[k]
        return shown[::-1, j] if plane == "coronal" else shown[::-1, :, i]

    def places(self) -> dict[str, tuple[float, float, float, float]]:
        """Left, top, width and height of each plane in inches, from the top left corner of the cell."""
        size = {plane: (w * self.inches_per_mm, h * self.inches_per_mm) for plane, (w, h) in self.size_mm.items()}
        (axial_width, axial_height), (_, flat_height) = size["axial"], size["coronal"]
        right = max(size["coronal"][0], size["sagittal"][0])
        left = (_CELL - axial_width - _SPLIT - right) / 2
        beside = left + axial_width + _SPLIT
        top = (self.cell_height - 2 * flat_height - _SPLIT) / 2
        return {
            "axial": (left, (self.cell_height - axial_height) / 2, *size["axial"]),
            "coronal": (beside, top, *size["coronal"]),
            "sagittal": (beside, top + flat_height + _SPLIT, *size["sagittal"]),
        }


def _draw_cell(
    figure: Figure, view: _View, kind: str, structures: Mapping[str, int | list[int]], *, x: float, y: float
) -> None:
    """One volume as image, with its reference, or with its prediction; x, y: top left corner in inches."""
    figure_width, figure_height = figure.get_size_inches()
    for plane, (left, top, width, height) in view.places().items():
        corner = ((x + left) / figure_width, (y - top - height) / figure_height)
        axes = figure.add_axes((*corner, width / figure_width, height / figure_height))
        axes.set_axis_off()
        extent = (0.0, view.size_mm[plane][0], view.size_mm[plane][1], 0.0)
        low, high = view.window
        image = view.plane(view.panel.image, plane)
        # The axes already have the shape of the plane in mm, voxels of any size included.
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bicubic", aspect="auto")
        if kind == "reference" and view.panel.reference is not None:
            _overlay(axes, view.plane(view.panel.reference, plane), structures, extent)
        elif kind == "prediction":
            _overlay(axes, view.plane(view.panel.prediction, plane), structures, extent)
            if view.panel.reference is not None:
                _outline(axes, view.plane(view.panel.reference, plane), structures, extent)
        else:
            _name_plane(axes, plane)


def _overlay(axes: Axes, labels: NDArray[Any], structures: Mapping[str, int | list[int]], extent: Extent) -> None:
    for colour, mask in _coloured_masks(labels, structures):
        rgba = np.zeros((*mask.shape, 4))
        rgba[..., :3] = to_rgb(colour)
        rgba[..., 3] = 0.62 * mask
        axes.imshow(rgba, extent=extent, interpolation="nearest", aspect="auto")


def _outline(axes: Axes, labels: NDArray[Any], structures: Mapping[str, int | list[int]], extent: Extent) -> None:
    """Border of each structure along the voxel edges."""
    for _, mask in _coloured_masks(labels, structures):
        if mask.any():
            # Each voxel as a block of pixels, so that the contour follows the voxels' edges and not their centres.
            blocks = np.pad(np.kron(mask, np.ones((8, 8))), 1)
            rows, columns = mask.shape
            x = (np.arange(blocks.shape[1]) - 0.5) / (8 * columns) * extent[1]
            y = (np.arange(blocks.shape[0]) - 0.5) / (8 * rows) * extent[2]
            axes.contour(x, y, blocks, levels=[0.5], colors="white", linewidths=0.9)


def _coloured_masks(
    labels: NDArray[Any], structures: Mapping[str, int | list[int]]
) -> list[tuple[str, NDArray[np.bool_]]]:
    return [(_colour(i), np.isin(labels, value)) for i, value in enumerate(structures.values())]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _name_plane(axes: Axes, plane: str) -> None:
    """The name of the plane in its corner, and letters for the directions of its edges."""
    shadow = [withStroke(linewidth=1.5, foreground="black")]
    options: dict[str, Any] = {"color": "white", "transform": axes.transAxes, "path_effects": shadow}
    axes.text(0.03, 0.97, plane, fontsize=7.5, ha="left", va="top", **options)
    top, bottom, left, right = tuple(_LETTERS[plane])
    axes.text(0.5, 0.98, top, fontsize=6, ha="center", va="top", **options)
    axes.text(0.5, 0.02, bottom, fontsize=6, ha="center", va="bottom", **options)
    axes.text(0.02, 0.5, left, fontsize=6, ha="left", va="center", **options)
    axes.text(0.98, 0.5, right, fontsize=6, ha="right", va="center", **options)


def _draw_legend(
    figure: Figure,
    structures: Mapping[str, int | list[int]],
    captions: Mapping[str, str],
    has_reference: bool,
    *,
    y: float,
) -> None:
    named = list(structures)[:MAX_NAMED]
    handles: list[Any] = [
        Patch(color=_colour(i), label=f"{name}  {captions.get(name, '')}".rstrip()) for i, name in enumerate(named)
    ]
    if len(structures) > MAX_NAMED:
        handles.append(Patch(color="none", label=f"and {len(structures) - MAX_NAMED} more"))
    if has_reference:
        handles.append(Line2D([], [], color="white", linewidth=0.9, label="outline of the reference"))
    legend = figure.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, y), ncols=min(len(handles), 4), frameon=False,
        fontsize=8.5, labelcolor="white", handlelength=1.3, columnspacing=1.8,
    )  # fmt: skip
    legend.set_in_layout(False)


def _centre(mask: NDArray[np.bool_]) -> list[int]:
    """Centre of mass in whole voxels; the middle of the array when the mask is empty."""
    if not mask.any():
        return [size // 2 for size in mask.shape]
    return [round(float(np.average(np.arange(len(counts)), weights=counts))) for counts in _counts_per_plane(mask)]


def _box_with_margin(mask: NDArray[np.bool_], spacing_mm: Sequence[float]) -> tuple[slice, ...]:
    """Around the mask, with a quarter of its size and at least 8 mm to spare; everything when the mask is empty."""
    if not mask.any():
        return tuple(slice(0, size) for size in mask.shape)
    box = []
    for counts, size, spacing in zip(_counts_per_plane(mask), mask.shape, spacing_mm, strict=True):
        occupied = np.flatnonzero(counts)
        low, high = int(occupied[0]), int(occupied[-1]) + 1
        margin = int(np.ceil(max(8 / spacing, (high - low) / 4)))
        box.append(slice(max(low - margin, 0), min(high + margin, size)))
    return tuple(box)


def _counts_per_plane(mask: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """For each axis, the number of voxels in each plane across it."""
    axes = range(mask.ndim)
    return [mask.sum(tuple(other for other in axes if other != axis), dtype=np.int64) for axis in axes]
