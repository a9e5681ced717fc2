"""How much work and memory one case takes, from its size alone: an upper bound of both.

nnU-Net crops an image to what is not 0 before anything else; how much is not known before, so nothing is cropped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medmamba.inference.orientation import Orientation

from .model_predictor import ModelPredictor
from .resample import BLOCK
from .window import tile_starts

#: Bytes of a float32 and of a float64.
_F4, _F8 = 4, 8
#: scipy pads by this on both sides before it fits splines.
_SPLINE_PADDING = 12
#: A block, what it is made from along each axis, and its labels.
_COPIES_OF_BLOCK = 6
#: As in :mod:`.resample`.
_ANISOTROPIC = 3


@dataclass(frozen=True)
class Demand:
    """What a case of some size means for a model.

    Attributes:
        shape: of the image, axes as the network has them.
        resampled: at the spacing of the plans.
        padded: at least as large as a tile.
        tile: (d, h, w) of the network, or (h, w) where it sees one plane.
        step: of the sliding window.
        channels, heads: of the network's input and output.
        is_alone: whether one axis is resampled by itself.
    """

    shape: tuple[int, ...]
    resampled: tuple[int, ...]
    padded: tuple[int, ...]
    tile: tuple[int, ...]
    step: float
    channels: int
    heads: int
    is_alone: bool

    @classmethod
    def of(cls, predictor: ModelPredictor, shape: Sequence[int], spacing_mm: Sequence[float]) -> Demand:
        """
        Args:
            shape: (D, H, W) of the image along the axes of the model, i.e. turned where the model wants it so.
            spacing_mm: along the same axes.
        """
        model = predictor.model
        settings, order = model.configuration, model.plans["transpose_forward"]
        own = [shape[axis] for axis in order]
        before = [spacing_mm[axis] for axis in order]
        missing = 3 - len(settings["patch_size"])
        wanted = before[:missing] + list(settings["spacing"])
        tile = tuple(settings["patch_size"])
        # In this order of operations, as nnU-Net's compute_new_shape.
        resampled = tuple(max(1, round(old / new * size)) for old, new, size in zip(before, wanted, own, strict=True))
        if settings["resampling_fn_data"] == "no_resampling_hack":
            resampled = tuple(own)
        return cls(
            shape=tuple(own),
            resampled=resampled,
            padded=tuple(max(size, part) for size, part in zip(resampled, (1,) * missing + tile, strict=True)),
            tile=tile,
            step=predictor.step,
            channels=len(model.channel_names),
            heads=model.outputs.num_heads,
            is_alone=any(max(sizes) / min(sizes) > _ANISOTROPIC for sizes in (before, wanted)),
        )

    @property
    def tiles(self) -> int:
        """Positions of the sliding window."""
        covered = self.padded[-len(self.tile) :]
        planes = math.prod(self.padded[: -len(self.tile)])
        return planes * math.prod(len(tile_starts(*sizes, self.step)) for sizes in zip(covered, self.tile, strict=True))

    def preparing_bytes(self) -> int:
        """Most that nnU-Net's preprocessing holds besides the image as it was read.

        N, M: voxels of the image, and of the resampled one; C channels; P: as N, with the padding for splines.

        - 4 C N: the image in float32; 6 N: masks while the nonzero region is searched;
        - resampled: 4 C M for the result, 8 C N for the image in float64, and for one channel after the other
          - 16 P + 8 M: padded and fitted splines, and what is read from them,
          - or 72 M + 8 max(N, M) with one axis by itself: coordinates of all voxels, and the image between both steps.
        """
        n, m = math.prod(self.shape), math.prod(self.resampled)
        own = _F4 * self.channels * n
        if self.resampled == self.shape:
            return own + 6 * n
        p = math.prod(size + 2 * _SPLINE_PADDING for size in self.shape)
        one_channel = 9 * _F8 * m + _F8 * max(n, m) if self.is_alone else 2 * _F8 * p + _F8 * m
        return own + max(6 * n, _F4 * self.channels * m + _F8 * self.channels * n + one_channel)

    def predicting_bytes(self, pass_bytes: int, label_bytes: int) -> int:
        """Most that sliding window and export hold besides the image as it was read.

        M, A: voxels of the network's input, and of one plane of it; N: of the result; K heads, d planes of a tile.

        - 4 C M + M: the input and nnU-Net's mask; 2 u N: labels of u bytes;
        - 4 (K + 1) d A: sums of logits and of weights; 4 d A: those of one class, while they move on by some planes;
        - 4 K A: the last plane that is out, which the next one is interpolated with;
        - while the network runs: what one pass takes, and 12 K d h w for the mean over reflections;
        - or while planes are exported: six copies of a block of logits.

        Where the sums do not fit, the volume is predicted in strips (:mod:`.strips`), and they are less.

        Args:
            pass_bytes: what one pass of the network over one tile takes.
            label_bytes: u.
        """
        depth = self.tile[0] if len(self.tile) == 3 else 1
        plane = math.prod(self.padded[1:])
        m, n = math.prod(self.padded), math.prod(self.shape)
        sums = (_F4 * self.heads + 2 * _F4) * depth * plane + _F4 * self.heads * plane
        kept = (_F4 * self.channels + 1) * m + 2 * label_bytes * n + sums
        running = pass_bytes + 3 * _F4 * self.heads * math.prod(self.tile)
        return kept + max(running, _COPIES_OF_BLOCK * _F4 * BLOCK)


def num_passes(predictor: ModelPredictor) -> int:
    """Passes of a network over each tile: folds x reflections."""
    reflections = 2 ** len(predictor.model.mirror_axes) if predictor.mirrors else 1
    return len(predictor.folds or predictor.model.folds) * reflections


def image_bytes(voxels: int, dtypes: Sequence[int], orientation: Orientation | None) -> int:
    """What is held of an image as it was read: each channel, turned where axes change places, and all as one array.

    Args:
        voxels: of one channel.
        dtypes: bytes per voxel of each channel.
        orientation: how it is turned; None where it is taken as it lies.
    """
    is_copied = orientation is not None and orientation.axes != (0, 1, 2)
    return voxels * (sum(dtypes) * (1 + is_copied) + len(dtypes) * max(dtypes))
