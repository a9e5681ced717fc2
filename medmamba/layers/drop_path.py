"""Stochastic depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch per sample with probability ``rate``, scaling the kept ones by 1 / (1 - rate).

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv:1603.09382.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Rates that rise linearly from 0 to ``last`` over all blocks, one list per stage."""
    total = sum(depths)
    rates = [last * i / max(1, total - 1) for i in range(total)]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
