"""One case from values to labels: nnU-Net's preprocessing, the stream of logits, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medmamba.inference.model import Labels
from medmamba.stop import Stopped

from .labels import decide, dtype_of
from .resample import axis_maps, resample_slabs
from .window import Forward, predict_slabs

#: How nnU-Net's plans name the resampling that :mod:`.resample` repeats, and the arguments that it stands for.
_RESAMPLING = "resample_data_or_seg_to_shape"
_ARGUMENTS = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class Window:
    """How the sliding window moves.

    Attributes:
        step: largest distance of two tiles over their size; nnU-Net's is 0.5.
        should_stop: asked before every tile.
    """

    step: float = 0.5
    should_stop: Callable[[], bool] = lambda: False


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
        forward: of the network or networks, (1, C, *tile) float32 -> (1, K, *tile).
        plans: of nnU-Net, with the configuration.
        configuration: its name.
        labels: what the outputs of the network mean.
        window: see there.

    Returns:
        (D, H, W) uint8, or int32 with labels above 255.

    Raises:
        Stopped: the window was asked to stop.
        ValueError: plans with another resampling of logits than nnU-Net's default.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    window = window or Window()
    manager = PlansManager(dict(plans))
    settings = manager.get_configuration(configuration)
    _check_resampling(settings.configuration)
    properties: dict[str, Any] = {"spacing": list(spacing_mm)}
    data, _, properties = settings.preprocessor_class(verbose=False).run_case_npy(
        values, None, properties, manager, settings, {}
    )
    image, inner = _padded(torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)), settings.patch_size)
    del data
    before = [properties["spacing"][axis] for axis in manager.transpose_forward]
    planned = list(settings.spacing)
    target = properties["shape_after_cropping_and_before_resampling"]
    maps = axis_maps(
        [part.stop - part.start for part in inner], target, [before[0]] * (3 - len(planned)) + planned, before
    )
    slabs = predict_slabs(
        image, _unless(window, forward), tile=settings.patch_size, step=window.step, classes=labels.num_heads
    )
    cropped = torch.empty(tuple(target), dtype=dtype_of(labels))
    done = 0
    for logits in resample_slabs(_without_padding(slabs, inner), maps):
        cropped[done : done + logits.shape[1]] = decide(logits, labels)
        done += logits.shape[1]
    whole = torch.zeros(tuple(properties["shape_before_cropping"]), dtype=dtype_of(labels))
    whole[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])] = cropped
    return np.ascontiguousarray(whole.numpy().transpose(manager.transpose_backward))


def _unless(window: Window, forward: Forward) -> Forward:
    def asked(x: Tensor) -> Tensor:
        if window.should_stop():
            raise Stopped
        with torch.inference_mode():
            return forward(x)

    return asked


def _check_resampling(configuration: Mapping[str, Any]) -> None:
    name = configuration["resampling_fn_probabilities"]
    arguments = {**_ARGUMENTS, **configuration["resampling_fn_probabilities_kwargs"]}
    if name != _RESAMPLING or arguments != _ARGUMENTS:
        raise ValueError(
            f"the plans resample logits with {name} {arguments}; only nnU-Net's default, {_RESAMPLING} with "
            f"{_ARGUMENTS}, is known here: predict with nnUNetv2_predict"
        )


def _padded(image: Tensor, tile: Sequence[int]) -> tuple[Tensor, list[slice]]:
    """The image with zeros around it where it is smaller than the tile, as nnU-Net pads, and where it lies within."""
    wanted = [*image.shape[1 : 4 - len(tile)], *tile]
    missing = [max(0, size - here) for size, here in zip(wanted, image.shape[1:], strict=True)]
    before = [size // 2 for size in missing]
    inner = [slice(start, start + size) for start, size in zip(before, image.shape[1:], strict=True)]
    if not any(missing):
        return image, inner
    sides = [(first, both - first) for first, both in zip(before, missing, strict=True)]
    # torch pads the last axis first.
    return torch.nn.functional.pad(image, [size for pair in reversed(sides) for size in pair]), inner


def _without_padding(slabs: Any, inner: Sequence[slice]) -> Any:
    along, rows, columns = inner
    first = 0
    for slab in slabs:
        start, stop = max(along.start - first, 0), min(along.stop - first, slab.shape[1])
        first += slab.shape[1]
        if start < stop:
            yield slab[:, start:stop, rows, columns]
