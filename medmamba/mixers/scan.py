"""The selective scan of a volume along K routes, each with its own weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.parameters import exempt_from_decay
from medmamba_kernels import resolve_routes, selective_scan

# Step sizes at initialisation: log-uniform in this range, not below the floor (Gu & Dao 2023, section 3.6).
_DT_RANGE = (1e-3, 1e-1)
_DT_FLOOR = 1e-4


class ScanCore(nn.Module):
    """S6 over K routes, summed in the volume's order.

    Per route k, with u the tokens in that route's order::

        (r, B, C) = P_k u            dt = softplus(Q_k r + bias_k)
        h_t = exp(dt A_k) * h_{t-1} + dt u_t B_t          y_t = h_t C_t + D_k u_t

    Parameters: ``x_proj`` (K, R + 2N, E) = P, ``dt_proj`` (K, E, R) = Q, ``dt_bias`` (K, E), ``A_log`` (K, E, N),
    ``D`` (K, E). Initialised as in Mamba and VMamba: A = -1 ... -N, D = 1, Q uniform
    within R^-1/2, the bias so that softplus(bias) is log-uniform in [1e-3, 1e-1].

    Args:
        width: E, channels of the tokens.
        d_state: N, states per channel.
        routes: name of a route set, or a list of routes.
        dt_rank: R, rank of the step size projection (the published blocks take ceil(block width / 16)).

    Source: Gu & Dao, 2023, arXiv:2312.00752; Liu et al., "VMamba", 2024, arXiv:2401.10166.
    """

    def __init__(self, width: int, *, d_state: int, dt_rank: int, routes: str | Sequence[str]):
        super().__init__()
        self.routes = resolve_routes(routes)
        count = len(self.routes)
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
        low, high = (math.log(value) for value in _DT_RANGE)
        dt = torch.exp(torch.rand_like(self.dt_bias) * (high - low) + low).clamp_min(_DT_FLOOR)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1).float()).expand_as(self.A_log))

    def forward(self, u: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E)."""
        batch, length, _ = u.shape
        count, rows, width = self.x_proj.shape
        projected = F.linear(u, self.x_proj.view(count * rows, width)).view(batch, length, count, rows)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return selective_scan(
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
        )

    def extra_repr(self) -> str:
        routes = " ".join(str(route) for route in self.routes)
        return f"width={self.D.shape[-1]}, d_state={self.d_state}, dt_rank={self.dt_rank}, routes={routes}"
