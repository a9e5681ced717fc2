"""How the results of several routes become one, where a sum is not enough."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: In the denominator of the coefficient of variation, as published.
EPSILON = 1e-5
_PUBLISHED_ROUTES = 4
# Below this variance the gate is closed: the deviation is under 1e-5 of EPSILON.
_TINY = 1e-20


class GatedFusion(nn.Module):
    """MHS-VM's gated fusion unit: the sum of the routes, weighted by how much they disagree.

    For every channel and token, over the K results y_1 ... y_K::

        cv = std(y) / (mean(y - min y) + 1e-5)          out = sum(y) * max(0, cv - threshold)

    with K - 1 under the root of std. For K numbers cv lies in [sqrt(K) / (K - 1), sqrt(K)], or below where they
    differ by no more than the 1e-5, down to 0 when they are equal. It changes neither with a shift nor (but
    for the 1e-5) with the scale of the y. No parameters.

    Args:
        threshold: subtracted from cv, 0 or more.

    Raises:
        ValueError: a threshold that is negative or not finite.

    Source: Ji, "MHS-VM", 2024, arXiv:2406.05992 (scan route attention with sigma(x, t) = ReLU(x - t)); the 1e-5 is that
    of the released code.
    """

    def __init__(self, threshold: float):
        super().__init__()
        if not 0 <= threshold < math.inf:
            raise ValueError(f"the threshold of the gate must be a number of 0 or more, got {threshold}")
        self.threshold = threshold

    def forward(self, y: Tensor) -> Tensor:
        """(B, K, L, E) results of K >= 2 routes -> (B, L, E), in float32 or, for float64, in float64.

        Raises:
            ValueError: fewer than two routes, of which there is no deviation.
        """
        require_routes(y.shape[1])
        # The routes agree in most of their digits (D is 1 for all of them at first): half precision would leave none.
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        # Differences to one smallest value: exactly 0 between equal routes.
        excess = y - y.min(dim=1, keepdim=True).values
        mean = excess.mean(dim=1, keepdim=True)
        variance = (excess - mean).square().sum(dim=1) / (y.shape[1] - 1)
        # variance / sqrt(variance), for a gradient of 0 instead of NaN where it is 0. torch.std has that too, but
        # takes more than twice the time on CPUs.
        deviation = variance * torch.rsqrt(variance.clamp_min(_TINY))
        variation = deviation / (mean.squeeze(1) + EPSILON)
        return y.sum(dim=1) * torch.relu(variation - self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}"


def rescaled_threshold(published: float, routes: int) -> float:
    """A threshold meant for the four routes of the published heads, for another number K of routes.

    The lower end of cv is sqrt(K) / (K - 1), 2/3 for the published four. The threshold keeps its ratio to
    that end: 0.5 becomes 0.367 for six routes, and stays below every value that distinct routes can give.

    Raises:
        ValueError: fewer than two routes.
    """
    require_routes(routes)
    return published * _smallest_variation(routes) / _smallest_variation(_PUBLISHED_ROUTES)


def require_routes(count: int) -> None:
    """ValueError unless there are two results to compare."""
    if count < 2:
        raise ValueError(f"the gate compares the results of at least 2 routes, got {count}; add the route's reverse")


def _smallest_variation(routes: int) -> float:
    """std / mean of K numbers of which one is 0 and the others are equal."""
    return math.sqrt(routes) / (routes - 1)
