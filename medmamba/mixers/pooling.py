"""Sums over all tokens of a volume, of which there may be 10^5."""

from __future__ import annotations

from torch import Tensor

from .precision import at_least_float32, full_precision


def sum_over_tokens(weights: Tensor, tokens: Tensor) -> Tensor:
    """(B, L, N) weights and (B, L, E) tokens -> (B, N, E) in float32, or float64; under autocast too.

    float16 cannot hold a sum of so many tokens, nor the weights of their mean.
    """
    with full_precision(tokens):
        return at_least_float32(weights).mT @ at_least_float32(tokens)
