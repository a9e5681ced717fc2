"""What a run shows: lines in the log, and TensorBoard."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from medmamba.training.event_files import event_writer

from .validation import Outcome

_log = logging.getLogger(__name__)

#: Seconds between two lines of the log.
_LINE_EVERY_S = 10.0
#: Validation crops that are drawn.
_PICTURES = 4
#: Factor from voxels to pixels, for crops smaller than this many voxels.
_SMALL = 128


class Monitor:
    """Writes scalars of every step and pictures of every validation; closes its file at the end of ``with``.

    Args:
        folder: for TensorBoard.
        start: first step of this process's life; what an earlier one wrote from there on is hidden.
        steps: of the whole run.
    """

    def __init__(self, folder: Path, *, start: int, steps: int) -> None:
        self._writer = event_writer(folder, start)
        self._steps = steps
        self._since, self._crops, self._waited = time.monotonic(), 0, 0.0

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def step(self, step: int, scalars: Mapping[str, float], *, crops: int, waited_s: float) -> None:
        """One optimizer step.

        Args:
            step: its number, from 0.
            scalars: by the names of TensorBoard's tags.
            crops: that were seen in it, over all processes.
            waited_s: seconds that this process waited for its crops.
        """
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        self._crops += crops
        self._waited += waited_s
        elapsed = time.monotonic() - self._since
        if elapsed < _LINE_EVERY_S and step + 1 < self._steps:
            return
        speed, share = self._crops / elapsed, self._waited / elapsed
        self._writer.add_scalar("time/crops_per_second", speed, step)
        self._writer.add_scalar("time/data_wait_share", share, step)
        _log.info(
            "step %d/%d  loss %.4f  lr %.2g  gradient %.2g  %.2f crops/s  waiting for data %.0f %%",
            step + 1,
            self._steps,
            scalars["train/loss"],
            scalars["train/lr"],
            scalars["train/gradient_norm"],
            speed,
            100 * share,
        )
        self._since, self._crops, self._waited = time.monotonic(), 0, 0.0

    def validation(self, step: int, outcome: Outcome) -> None:
        """What a validation after ``step`` steps has found."""
        self._writer.add_scalar("validation/loss", outcome.loss, step)
        for i in range(min(_PICTURES, len(outcome.image))):
            picture = picture_of(outcome.image[i, 0], outcome.visible[i, 0], outcome.predicted[i, 0])
            self._writer.add_image(f"validation/crop_{i}", picture, step)
        self._writer.flush()
        _log.info("step %d/%d  validation loss %.4f", step, self._steps, outcome.loss)


def picture_of(image: Tensor, visible: Tensor, predicted: Tensor) -> Tensor:
    """input | masked | reconstruction | error, in the middle plane across each axis, one below the other.

    Grey runs from the least to the largest value of the image, for the error from 0 to their difference; what is masked
    is black in the second column. Superior and anterior are up, right is left, as radiologists look at it.

    Args:
        image: (D, H, W), or (H, W), which has one plane.
        visible: bool, the same shape.
        predicted: the same shape, e.g. of :func:`medmamba_pretrain.loss.restored`.

    Returns:
        (1, rows, columns) float32 in [0, 1].
    """
    low, high = float(image.min()), float(image.max())
    scale = max(high - low, 1e-12)
    grey = [((x.float() - low) / scale).clamp(0, 1) for x in (image, predicted)]
    error = ((predicted.float() - image.float()).abs() / scale).clamp(0, 1)
    columns = [grey[0], torch.where(visible, grey[0], 0), grey[1], error]
    rows = [torch.cat([_plane(column, axis) for column in columns], 1) for axis in range(_planes(image))]
    width = max(row.shape[1] for row in rows)
    picture = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows], 0)
    zoom = max(1, _SMALL // max(image.shape))
    return picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)[None]


def _planes(image: Tensor) -> int:
    return 3 if image.dim() == 3 else 1


def _plane(volume: Tensor, axis: int) -> Tensor:
    plane = volume.select(axis, volume.shape[axis] // 2) if volume.dim() == 3 else volume
    return plane.flip(0, 1)
