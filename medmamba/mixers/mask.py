"""Tokens that take part, and tokens that do not."""

from __future__ import annotations

import torch
from torch import Tensor


def keep(u: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens with 0 where the mask is False; the same tensor without a mask.

    Args:
        u: (B, L, E), any float dtype. What stands behind the mask, NaN included, reaches neither result nor gradient.
        mask: (B, L) bool, or None.
    """
    return u if mask is None else torch.where(mask.unsqueeze(-1), u, 0)
