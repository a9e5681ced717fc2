"""From stored int16 values to what a network sees."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from medmamba_pretrain.corpus.record import Record
from medmamba_pretrain.recipe import Recipe

#: Numbers per volume that :func:`normalise` needs: low, high, mean, std, all in stored values.
CONSTANTS = 4


def constants_of(record: Record, recipe: Recipe) -> tuple[float, float, float, float]:
    """low, high, mean and std of a volume, in stored values.

    CT: the recipe's, the same for all volumes, because stored values are HU. MR: no limits, and mean and standard
    deviation of the volume, of a regular subset of its voxels: :func:`medmamba_pretrain.corpus.intensity.summary_of`.
    """
    if recipe.modality == "ct":
        window = recipe.normalisation
        return window["low"], window["high"], window["mean"], window["std"]
    mean = (record.intensity["mean"] - record.offset) / record.scale
    return -math.inf, math.inf, mean, max(record.intensity["std"] / record.scale, 1e-8)


def normalise(stored: Tensor, constants: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(clip(stored, low, high) - mean) / std``.

    Args:
        stored: (B, C, *spatial) int16.
        constants: (B, 4), see :func:`constants_of`.
        dtype: of the result, and to compute in.
    """
    low, high, mean, std = constants.to(dtype).view(-1, CONSTANTS, *[1] * (stored.dim() - 1)).unbind(1)
    return (stored.to(dtype).clamp(low, high) - mean) / std


def description_of(recipe: Recipe) -> Mapping[str, str | float]:
    """The same for an encoder's file, in the words of nnU-Net's plans."""
    if recipe.modality == "ct":
        return {"scheme": "CTNormalization", **recipe.normalisation}
    return {"scheme": "ZScoreNormalization"}
