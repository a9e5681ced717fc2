"""One case from values to labels: nnU-Net's preprocessing, the stream of logits, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medmamba.inference.model import Labels
from medmamba.inference.model.plans import check_logits_resampling
from medmamba.stop import Stopped

from .air import empty_voxels, is_masked, surroundings
from .labels import background_logits, decide, dtype_of
from .resample import AxisMap, axis_maps, resample_slabs
from .strips import divide_rows
from .window import Forward, Skip, count_tiles, predict_slabs


@dataclass(frozen=True)
class Window:
    """How the sliding window moves, and what it may take.

    Attributes:
        step: largest distance of two tiles over their size; nnU-Net's is 0.5.
        should_stop: asked before every tile.
        skips_air: whether tiles in which there is nothing are left out; see :mod:`.air`.
        masks_air: whether ``forward`` is told what is neither padding nor the air around the patient: as one channel
            more, 1 there and 0 elsewhere.
        max_ram_bytes: of the process, see :mod:`.strips`; None: what the machine or container has.
        facts: takes what there is to report: ``tiles`` of the window, ``tiles_computed`` of them (more where strips
            share tiles), ``strips``.
    """

    step: float = 0.5
    should_stop: Callable[[], bool] = lambda: False
    skips_air: bool = False
    masks_air: bool = False
    max_ram_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def predict_case(
    values: NDArray[np.generic],
    spacing_mm: Sequence[float],
    forward: Forward,
    plans: Mapping[str, Any],
    configuration: str,
    labels: Labels,
    window: Window | None = None,
) -> NDArray[np.integer[Any]]:
    """Labels of one case on the grid of its image.

    Args:
        values: (C, D, H, W) in the file's units, axes as in training.
        spacing_mm: along D, H, W.
        forward: of the network or networks, (1, C, *tile) float32 -> (1, K, *tile); C + 1 with ``masks_air``.
        plans: of nnU-Net, with the configuration.
        configuration: its name.
        labels: what the outputs of the network mean.
        window: see there.

    Returns:
        (D, H, W) uint8, or int32 with labels above 255.

    Raises:
        Stopped: the window was asked to stop.
        MemoryError: ``max_ram_bytes`` is too little for this image.
        ModelRefused: plans with another resampling of logits than nnU-Net's default.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    window = window or Window()
    manager = PlansManager(dict(plans))
    settings = manager.get_configuration(configuration)
    check_logits_resampling(settings.configuration, f"configuration {configuration}")
    properties: dict[str, Any] = {"spacing": list(spacing_mm)}
    data, _, properties = settings.preprocessor_class(verbose=False).run_case_npy(
        values, None, properties, manager, settings, {}
    )
    image = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    del data
    before = [properties["spacing"][axis] for axis in manager.transpose_forward]
    planned = list(settings.spacing)
    target = properties["shape_after_cropping_and_before_resampling"]
    maps = axis_maps(image.shape[1:], target, [before[0]] * (3 - len(planned)) + planned, before)
    masked = is_masked(settings.normalization_schemes, settings.use_mask_for_norm)
    empty = empty_voxels(image, masked) if window.skips_air or window.masks_air else None
    cropped = _segmented(image, empty, maps, settings.patch_size, forward, labels, window)
    whole = torch.zeros(tuple(properties["shape_before_cropping"]), dtype=dtype_of(labels))
    whole[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])] = cropped
    return np.ascontiguousarray(whole.numpy().transpose(manager.transpose_backward))


def _segmented(
    image: Tensor,
    empty: Tensor | None,
    maps: Sequence[AxisMap],
    tile: Sequence[int],
    forward: Forward,
    labels: Labels,
    window: Window,
) -> Tensor:
    """Labels of a preprocessed image (C, D, H, W) on the grid that the maps lead to."""
    if window.masks_air and empty is not None:
        image = torch.cat([image, (~surroundings(empty))[None]])
    padded, inner = pad_to_tile(image, tile)
    skip = None
    if window.skips_air and empty is not None:
        skip = Skip(pad_to_tile(empty[None], tile, True)[0][0], background_logits(labels))
    computed = _Counted(forward, window.should_stop)
    row_bytes = 4 * labels.num_heads * (tile[0] if len(tile) == 3 else 1) * padded.shape[3]
    strips = divide_rows(maps[1], tile[-2], row_bytes, window.max_ram_bytes)
    result = torch.empty(tuple(len(each.low) for each in maps), dtype=dtype_of(labels))
    for wanted, needed in strips:
        _, rows = maps[1].part(wanted)
        within = slice(inner[1].start + needed.start, inner[1].start + needed.stop)
        slabs = predict_slabs(
            padded, computed, tile=tile, step=window.step, classes=labels.num_heads, rows=within, skip=skip
        )
        _write_labels(_without_padding(slabs, inner), (maps[0], rows, maps[2]), labels, result[:, wanted])
    tiles = count_tiles(padded.shape[1:], tile, window.step)
    window.facts.update(tiles=tiles, tiles_computed=computed.calls, strips=len(strips))
    return result


def _write_labels(slabs: Iterator[Tensor], maps: Sequence[AxisMap], labels: Labels, out: Tensor) -> None:
    """Decide on logits and write (D, H, W). On return nothing of them is held, so that the next strip has room."""
    for plane, rows, logits in resample_slabs(slabs, maps):
        out[plane, rows] = decide(logits, labels)


class _Counted:
    """A forward pass that may be stopped before, and is counted."""

    def __init__(self, forward: Forward, should_stop: Callable[[], bool]) -> None:
        self.forward, self.should_stop, self.calls = forward, should_stop, 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.should_stop():
            raise Stopped
        self.calls += 1
        with torch.inference_mode():
            return self.forward(x)


def pad_to_tile(image: Tensor, tile: Sequence[int], value: float = 0) -> tuple[Tensor, list[slice]]:
    """The image (C, D, H, W) within a margin where it is smaller than the tile, as nnU-Net pads, and its place."""
    wanted = [*image.shape[1 : 4 - len(tile)], *tile]
    missing = [max(0, size - here) for size, here in zip(wanted, image.shape[1:], strict=True)]
    before = [size // 2 for size in missing]
    inner = [slice(start, start + size) for start, size in zip(before, image.shape[1:], strict=True)]
    if not any(missing):
        return image, inner
    sides = [(first, both - first) for first, both in zip(before, missing, strict=True)]
    # torch pads the last axis first.
    return torch.nn.functional.pad(image, [size for pair in reversed(sides) for size in pair], value=value), inner


def _without_padding(slabs: Iterable[Tensor], inner: Sequence[slice]) -> Iterator[Tensor]:
    """Slabs (K, n, rows, W) without the planes and columns of padding; the rows are without already."""
    along, _, columns = inner
    first = 0
    for slab in slabs:
        start, stop = max(along.start - first, 0), min(along.stop - first, slab.shape[1])
        first += slab.shape[1]
        if start < stop:
            yield slab[:, start:stop, :, columns]
