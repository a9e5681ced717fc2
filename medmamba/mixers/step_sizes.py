"""The step sizes of a scan at initialisation, drawn through the bias of their softplus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .timescale import DEFAULT_DT_RANGE

#: Step sizes at initialisation: one (low, high) for all routes, one per route, or None for Mamba's.
DtRange = Sequence[float] | Sequence[Sequence[float]] | None


def inverse_softplus_of_log_uniform(width: int, routes: int, dt_range: DtRange) -> Tensor:
    """A new ``dt_bias`` (routes, width): softplus(bias) is log-uniform in ``dt_range``, see :func:`range_per_route`."""
    return bias_of(torch.rand(routes, width), range_per_route(dt_range, routes))


def bias_of(uniform: Tensor, ranges: Sequence[tuple[float, float]]) -> Tensor:
    """A bias (rows, width) from uniform random numbers in [0, 1): softplus(bias) is log-uniform in each row's range."""
    # Logarithms in double precision, as before there were ranges per route: the same seed gives the same bits.
    lows = [math.log(low) for low, _ in ranges]
    spans = [math.log(high) - low for (_, high), low in zip(ranges, lows, strict=True)]
    low, span = (uniform.new_tensor(values).unsqueeze(-1) for values in (lows, spans))
    dt = torch.exp(uniform * span + low)
    return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus


def range_per_route(dt_range: DtRange, count: int) -> list[tuple[float, float]]:
    """One (low, high) for each of ``count`` routes.

    Raises:
        ValueError: a range that is not positive and rising, or ranges for another number of routes.
    """
    chosen: Sequence[Any] = DEFAULT_DT_RANGE if dt_range is None else dt_range
    pairs = list(chosen) if chosen and isinstance(chosen[0], Sequence) else [chosen] * count
    if len(pairs) != count:
        raise ValueError(f"dt_range must be (low, high) or one such pair for each of the {count} routes, got {chosen}")
    for pair in pairs:
        if not (len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf):
            raise ValueError(f"dt_range must hold pairs 0 < low <= high, got {pair}")
    return [(float(low), float(high)) for low, high in pairs]
