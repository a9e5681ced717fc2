"""The selective scan of a volume along K routes, each with its own weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.parameters import exempt_from_decay
from medmamba_kernels import resolve_routes, selective_scan

from .mask import keep
from .timescale import DEFAULT_DT_RANGE

#: Step sizes at initialisation: one (low, high) for all routes, one per route, or None for Mamba's.
DtRange = Sequence[float] | Sequence[Sequence[float]] | None


class ScanCore(nn.Module):
    """S6 over K routes, summed in the volume's order.

    Per route k, with u the tokens in that route's order::

        (r, B, C) = P_k u            dt = softplus(Q_k r + bias_k)
        h_t = exp(dt A_k) * h_{t-1} + dt u_t B_t          y_t = h_t C_t + D_k u_t

    Parameters: ``x_proj`` (K, R + 2N, E) = P, ``dt_proj`` (K, E, R) = Q, ``dt_bias`` (K, E), ``A_log`` (K, E, N),
    ``D`` (K, E). Initialised as in Mamba and VMamba: A = -1 ... -N, D = 1, Q uniform
    within R^-1/2, the bias so that softplus(bias) is log-uniform in ``dt_range``.

    Args:
        width: E, channels of the tokens.
        d_state: N, states per channel.
        routes: name of a route set, or a list of routes.
        dt_rank: R, rank of the step size projection (the published blocks take ceil(block width / 16)).
        kernel_size: of the network's convolutions at this place, one entry per axis of the image; a scan ignores it.
        dt_range: step sizes at initialisation, ``(low, high)`` or one such pair per route (JSON-able; see
            :func:`medmamba.mixers.timescale.route_dt_range`). Default: Mamba's (1e-3, 1e-1).
        fusion: joins the results of the routes, (B, K, L, E) in the volume's order -> (B, L, E); default: their sum.

    Raises:
        ValueError: an unknown route, or a ``dt_range`` that is not positive and rising, or of another number of routes.

    Source: Gu & Dao, 2023, arXiv:2312.00752; Liu et al., "VMamba", 2024, arXiv:2401.10166.
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int,
        dt_rank: int,
        routes: str | Sequence[str],
        kernel_size: Sequence[int] = (3, 3, 3),
        dt_range: DtRange = None,
        fusion: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.fusion = fusion
        self.routes = resolve_routes(routes)
        count = len(self.routes)
        self.dt_ranges = _per_route(dt_range, count)
        self.dt_rank = dt_rank
        self.d_state = d_state
        self.x_proj = nn.Parameter(torch.empty(count, self.dt_rank + 2 * d_state, width))
        self.dt_proj = nn.Parameter(torch.empty(count, width, self.dt_rank))
        self.dt_bias = exempt_from_decay(nn.Parameter(torch.empty(count, width)))
        self.A_log = exempt_from_decay(nn.Parameter(torch.empty(count, width, d_state)))
        self.D = exempt_from_decay(nn.Parameter(torch.ones(count, width)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values (see the class docstring)."""
        bound = 1.0 / math.sqrt(self.x_proj.shape[-1])  # torch's default for a Linear layer of this input width
        self.x_proj.uniform_(-bound, bound)
        self.dt_proj.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self._draw_step_sizes(None)
        self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1).float()).expand_as(self.A_log))

    def reset_step_sizes(self, dt_range: DtRange, *, generator: torch.Generator | None = None) -> None:
        """Draw ``dt_bias`` anew, from another range; everything else stays.

        Args:
            dt_range: as the constructor's.
            generator: of the random numbers, on the device of the parameters; default: torch's own.

        Raises:
            ValueError: as the constructor.
        """
        self.dt_ranges = _per_route(dt_range, len(self.routes))
        self._draw_step_sizes(generator)

    @torch.no_grad()
    def _draw_step_sizes(self, generator: torch.Generator | None) -> None:
        uniform = torch.empty_like(self.dt_bias).uniform_(generator=generator)
        self.dt_bias.copy_(_bias_of(uniform, self.dt_ranges))

    def step_sizes(self, u: Tensor) -> Tensor:
        """What the scan multiplies A with, for tokens (B, L, E) in raster order: dt (B, L, K, E), positive."""
        r = torch.einsum("ble,kre->blkr", u, self.x_proj[:, : self.dt_rank])
        return F.softplus(torch.einsum("blkr,ker->blke", r, self.dt_proj) + self.dt_bias)

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`."""
        u = keep(u, mask)
        batch, length, _ = u.shape
        count, rows, width = self.x_proj.shape
        projected = F.linear(u, self.x_proj.view(count * rows, width)).view(batch, length, count, rows)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.fusion is not None:
            # The scan answers in the dtype of u; what sets the routes apart is small against what they share.
            u = u.to(torch.promote_types(u.dtype, torch.float32))
        y = selective_scan(
            u,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            routes=self.routes,
            grid=grid,
            dt_bias=self.dt_bias,
            dt_weight=self.dt_proj,
            dt_mask=mask,
            merge="sum" if self.fusion is None else "none",
        )
        return y if self.fusion is None else self.fusion(y)

    def extra_repr(self) -> str:
        routes = " ".join(str(route) for route in self.routes)
        return f"width={self.D.shape[-1]}, d_state={self.d_state}, dt_rank={self.dt_rank}, routes={routes}"


def inverse_softplus_of_log_uniform(width: int, routes: int, dt_range: DtRange) -> Tensor:
    """A new ``dt_bias`` (routes, width): softplus(bias) is log-uniform in ``dt_range``, see :class:`ScanCore`."""
    return _bias_of(torch.rand(routes, width), _per_route(dt_range, routes))


def _bias_of(uniform: Tensor, ranges: Sequence[tuple[float, float]]) -> Tensor:
    # Logarithms in double precision, as before there were ranges per route: the same seed gives the same bits.
    lows = [math.log(low) for low, _ in ranges]
    spans = [math.log(high) - low for (_, high), low in zip(ranges, lows, strict=True)]
    low, span = (uniform.new_tensor(values).unsqueeze(-1) for values in (lows, spans))
    dt = torch.exp(uniform * span + low)
    return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus


def _per_route(dt_range: DtRange, count: int) -> list[tuple[float, float]]:
    """One (low, high) per route."""
    chosen: Sequence[Any] = DEFAULT_DT_RANGE if dt_range is None else dt_range
    pairs = list(chosen) if chosen and isinstance(chosen[0], Sequence) else [chosen] * count
    if len(pairs) != count:
        raise ValueError(f"dt_range must be (low, high) or one such pair for each of the {count} routes, got {chosen}")
    for pair in pairs:
        if not (len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf):
            raise ValueError(f"dt_range must hold pairs 0 < low <= high, got {pair}")
    return [(float(low), float(high)) for low, high in pairs]
