"""How much of a token's contribution is left n steps later along a route.

In the scan h_t = exp(dt_t A) * h_(t-1) + dt_t x_t B_t (Gu & Dao, "Mamba", 2023, arXiv:2312.00752, eq. 2 and
section 3.2) what token s wrote into the state is multiplied, until token s + n reads it, by

    share(n) = exp(A (dt_(s+1) + ... + dt_(s+n)))        = exp(-n dt |A|) for a constant step size,

separately for every state of every channel (a *state-channel*): it is 1 at n = 0, 1/e at n = 1 / (dt |A|), and 0 once
the state was cleared. How strongly a token is written (dt x B) and read (C) is not part of it.

Shapes: b batch, L tokens, K routes, c channels, N states per channel, T distances, Q quantiles. A may also be
(K, c): one decay for all states of a channel or head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medmamba_kernels import Route, resolve_routes
from medmamba_kernels.routes import checked_grid


@dataclass(frozen=True)
class Influence:
    """Surviving share over all state-channels of a route, in 0..1.

    Attributes:
        distances: (T,) tokens.
        mean: (K, T) mean over the state-channels.
        quantiles: (K, T, Q) of the state-channels, in the order in which the quantiles were asked for.
        slowest: (K, T) the state-channel that keeps most at that distance.
    """

    distances: Tensor
    mean: Tensor
    quantiles: Tensor
    slowest: Tensor


def memory_tokens(dt: Tensor, A: Tensor) -> Tensor:
    """E-folding memory 1 / (dt |A|) of every state-channel: tokens until 37 % are left.

    Args:
        dt: (K, c) step sizes, positive.
        A: (K, c, N) or (K, c), negative.

    Returns:
        (K, c, N), or (K, c, 1).

    Raises:
        ValueError: shapes that do not fit, a step size that is not positive, an A that is not negative.
    """
    dt, A = _checked(dt, A)
    if dt.dim() != 2:
        raise ValueError(f"memory needs one step size per route and channel (K, c), got shape {tuple(dt.shape)}")
    return 1 / (dt.unsqueeze(-1) * -A)


def surviving_share(
    dt: Tensor,
    A: Tensor,
    distances: Sequence[int] | Tensor,
    *,
    routes: str | Sequence[str | Route] | None = None,
    grid: Sequence[int] | None = None,
) -> Tensor:
    """Share of a token's contribution that is left after n steps, for every state-channel.

    Args:
        dt: (K, c) typical step sizes, or (b, L, K, c) those of an input, tokens in raster order. For the latter the
            share is the mean over all pairs of tokens that are n steps apart in one segment of the route.
        A: (K, c, N) or (K, c), negative.
        distances: T numbers of steps, integers >= 0.
        routes: name of a route set or K routes; with ``grid`` they say where the state is cleared. Needed
            for (b, L, K, c); without them a (K, c) share is that of a route without end.
        grid: (D, H, W).

    Returns:
        (K, T, c, N), or (K, T, c, 1), in float64; 0 where no two tokens of a segment are that far apart.

    Raises:
        ValueError: shapes that do not fit, a distance that is negative or not whole, values of the wrong sign.
    """
    dt, A = _checked(dt, A)
    steps = torch.as_tensor(distances)
    if steps.dim() != 1 or steps.is_floating_point() or bool((steps < 0).any()):
        raise ValueError(f"distances must be a list of whole numbers >= 0, got {distances}")
    if (routes is None) != (grid is None) or (dt.dim() == 4 and routes is None):
        raise ValueError("routes and grid go together, and step sizes of an input (b, L, K, c) need both")
    segments = None if routes is None or grid is None else _segments(routes, grid, dt)
    if dt.dim() == 2:
        share = torch.exp(steps.to(dt).view(1, -1, 1, 1) * (dt.unsqueeze(-1) * A).unsqueeze(1))
        if segments is not None:
            longest = torch.stack([number.bincount().max() for _, number in segments])
            share = share * (steps.unsqueeze(0) < longest.unsqueeze(1)).unsqueeze(-1).unsqueeze(-1)
        return share
    assert segments is not None
    return torch.stack(
        [
            torch.stack([_mean_over_pairs(dt[:, order, k].cumsum(1), A[k], number, n) for n in steps.tolist()])
            for k, (order, number) in enumerate(segments)
        ]
    )


def influence(
    dt: Tensor,
    A: Tensor,
    distances: Sequence[int] | Tensor,
    *,
    routes: str | Sequence[str | Route] | None = None,
    grid: Sequence[int] | None = None,
    quantiles: Sequence[float] = (0.1, 0.5, 0.9),
) -> Influence:
    """Surviving share against distance, summarised over the state-channels of every route.

    Arguments and errors as :func:`surviving_share`; ``quantiles`` lie in 0..1.
    """
    shares = surviving_share(dt, A, distances, routes=routes, grid=grid).flatten(2)  # (K, T, c N)
    levels = torch.tensor(list(quantiles), dtype=shares.dtype)
    # Route by route: torch.quantile refuses tensors of more than 2^24 numbers.
    quantile = torch.stack([share.quantile(levels, dim=-1).movedim(0, -1) for share in shares])
    return Influence(torch.as_tensor(distances), shares.mean(-1), quantile, shares.amax(-1))


def _checked(dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU, A with a state axis."""
    dt, A = dt.detach().to("cpu", torch.float64), A.detach().to("cpu", torch.float64)
    A = A.unsqueeze(-1) if A.dim() == 2 else A
    if A.dim() != 3 or dt.dim() not in (2, 4) or dt.shape[-2:] != A.shape[:2]:
        raise ValueError(
            f"dt must be (K, c) or (b, L, K, c) and A (K, c, N) or (K, c), got {tuple(dt.shape)} and {tuple(A.shape)}"
        )
    if not bool((A < 0).all()):
        raise ValueError("A must be negative everywhere; pass -exp(A_log)")
    # A step size of 0 is a token that the state passes unchanged: possible in an input, no typical value.
    if not bool((dt > 0 if dt.dim() == 2 else dt >= 0).all()):
        raise ValueError("dt must be positive; pass step sizes after softplus")
    return dt, A


def _segments(routes: str | Sequence[str | Route], grid: Sequence[int], dt: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per route: visiting order (L,), and the number of its segment for every step (L,)."""
    resolved, sizes = resolve_routes(routes), checked_grid(grid)
    if len(resolved) != dt.shape[-2]:
        raise ValueError(f"dt has {dt.shape[-2]} routes but {len(resolved)} were named")
    length = sizes[0] * sizes[1] * sizes[2]
    if dt.dim() == 4 and dt.shape[1] != length:
        raise ValueError(f"dt has {dt.shape[1]} tokens but grid {sizes} has {length}")
    return [(route.order(sizes), route.starts(sizes).cumsum(0) - 1) for route in resolved]


def _mean_over_pairs(elapsed: Tensor, A: Tensor, segment: Tensor, n: int) -> Tensor:
    """Mean of exp(A (elapsed_(s+n) - elapsed_s)) over batch and pairs of one segment: (b, L, c), (c, N) -> (c, N)."""
    length = elapsed.shape[1]
    together = segment[n:] == segment[: max(length - n, 0)]
    if not bool(together.any()):
        return torch.zeros_like(A)
    between = (elapsed[:, n:] - elapsed[:, : length - n])[:, together]
    # State by state: (b, L, c, N) would be N times the step sizes.
    return torch.stack([torch.exp(between * column).mean((0, 1)) for column in A.unbind(-1)], dim=-1)
