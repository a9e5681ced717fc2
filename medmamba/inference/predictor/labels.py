"""From logits to labels, as nnU-Net decides: the largest of the classes, or each region by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from medmamba.inference.model import Labels

_CERTAIN = 10.0


def dtype_of(labels: Labels) -> torch.dtype:
    """uint8 where it suffices, else int32."""
    return torch.uint8 if max(labels.names) < 256 else torch.int32


def decide(logits: Tensor, labels: Labels) -> Tensor:
    """(K, *spatial) logits -> (*spatial) labels.

    A region is where its logit is above 0, that is its probability above one half; a later region overwrites an
    earlier one.
    """
    if labels.region_values is None:
        # Of equal ones the first, like argmax.
        return logits.max(0).indices.to(dtype_of(labels))
    result = torch.zeros(logits.shape[1:], dtype=dtype_of(labels))
    for channel, value in zip(logits, labels.region_values, strict=True):
        result[channel > 0] = value
    return result


def background_logits(labels: Labels) -> Tensor:
    """(K,) float32 logits of a voxel that is background: with a probability of 0.9999 against any one class or region.

    Finite, because the resampling mixes them with their neighbours.
    """
    logits = torch.full((labels.num_heads,), -_CERTAIN)
    if labels.region_values is None:
        logits[0] = 0
    return logits
