"""The selective scan of a volume along K routes, each with its own weights or in sets that share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.parameters import exempt_from_decay
from medmamba_kernels import selective_scan

from .mask import keep
from .routed import RoutedScan
from .step_sizes import DtRange


class ScanCore(RoutedScan):
    """S6 over K routes, summed in the volume's order.

    Per route k, with u the tokens in that route's order::

        (r, B, C) = P_k u            dt = softplus(Q_k r + bias_k)
        h_t = exp(dt A_k) * h_{t-1} + dt u_t B_t          y_t = h_t C_t + D_k u_t

    Parameters: ``x_proj`` (S, R + 2N, E) = P, ``dt_proj`` (S, E, R) = Q, ``dt_bias`` (S, E), ``A_log`` (S, E, N),
    ``D`` (S, E), for S sets of weights: one per route unless ``parameters`` says otherwise. Initialised as in Mamba and
    VMamba: A = -1 ... -N, D = 1, Q uniform within R^-1/2, the bias so that softplus(bias) is log-uniform in
    ``dt_range``.

    Args:
        width: E, channels of the tokens.
        d_state: N, states per channel.
        routes: name of a route set, or a list of routes.
        dt_rank: R, rank of the step size projection (the published blocks take ceil(block width / 16)).
        kernel_size: of the network's convolutions at this place, one entry per axis of the image; a scan ignores it.
        dt_range: step sizes at initialisation, see :class:`medmamba.mixers.routed.RoutedScan`.
        fusion: joins the results of the routes, (B, K, L, E) in the volume's order -> (B, L, E); default: their sum.
        parameters: "route": every route has weights of its own; "direction": all forward routes share one set of
            weights, and all reversed ones another; "shared": one set for all.

    Raises:
        ValueError: as :class:`medmamba.mixers.routed.RoutedScan`.

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
        parameters: str = "route",
    ):
        super().__init__(d_state, routes, dt_range, parameters)
        self.fusion = fusion
        count = len(self.dt_ranges)
        self.dt_rank = dt_rank
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
        self._draw_step_sizes()
        self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1).float()).expand_as(self.A_log))

    def step_sizes(self, u: Tensor) -> Tensor:
        """What the scan multiplies A with, for tokens (B, L, E) in raster order: dt (B, L, K, E), positive."""
        r = torch.einsum("ble,kre->blkr", u, self.x_proj[:, : self.dt_rank])
        dt = F.softplus(torch.einsum("blkr,ker->blke", r, self.dt_proj) + self.dt_bias)
        return self.per_route(dt, dim=2)

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`."""
        u = keep(u, mask)
        batch, length, _ = u.shape
        count, rows, width = self.x_proj.shape
        projected = F.linear(u, self.x_proj.view(count * rows, width)).view(batch, length, count, rows)
        dt, B, C = self.per_route(projected, dim=2).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.fusion is not None:
            # The scan answers in the dtype of u; what sets the routes apart is small against what they share.
            u = u.to(torch.promote_types(u.dtype, torch.float32))
        y = selective_scan(
            u,
            dt,
            self.per_route(-torch.exp(self.A_log)),
            B,
            C,
            self.per_route(self.D),
            routes=self.routes,
            grid=grid,
            dt_bias=self.per_route(self.dt_bias),
            dt_weight=self.per_route(self.dt_proj),
            dt_mask=mask,
            merge="sum" if self.fusion is None else "none",
        )
        return y if self.fusion is None else self.fusion(y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dt_rank={self.dt_rank}"
