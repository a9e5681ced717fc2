"""Sums over all tokens of a volume, of which there may be 10^5."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def sum_over_tokens(weights: Tensor, tokens: Tensor) -> Tensor:
    """(B, L, N) weights and (B, L, E) tokens -> (B, N, E) in float32, or float64; under autocast too.

    float16 cannot hold a sum of so many tokens, nor the weights of their mean.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    with _without_autocast(tokens):
        return weights.to(wide).mT @ tokens.to(wide)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    # The meta device, on which networks are counted, knows no autocast.
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
