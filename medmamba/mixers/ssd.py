"""The scan of Mamba-2 along K routes: one decay rate and one step size for each head of channels."""

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

#: Channels of a head. Mamba-2 has 64; stages of a U-Net are narrower, and a head has a single timescale.
HEAD_WIDTH = 16
#: Decay rates at initialisation are uniform in this range, as in Mamba-2.
_RATES = (1.0, 16.0)


class SSDCore(RoutedScan):
    """SSD, the scan of Mamba-2, over K routes, summed in the volume's order.

    Per route k and head, a head being P neighbouring channels, with u the tokens in that route's order::

        (r, B, C) = P_k u            dt = softplus(r + bias_k), one number per head
        h_t = exp(dt A_k) h_{t-1} + dt u_t B_t          y_t = h_t C_t + D_k u_t

    Parameters, for S sets of weights and H = E / P heads: ``x_proj`` (S, H + 2N, E) = P, ``dt_bias`` (S, H), ``A_log``
    (S, H), ``D`` (S, E). Initialised as in Mamba-2: -A uniform in 1 ... 16, D = 1, the bias so that softplus(bias)
    is log-uniform in ``dt_range``. Mamba-2's gate, norm and causal convolution are the block's business.

    Args:
        width: E, channels of the tokens.
        d_state: N, states per channel.
        routes: name of a route set, or a list of routes.
        dt_rank: ignored: a step size per head needs no low rank.
        kernel_size: of the network's convolutions at this place, one entry per axis of the image; a scan ignores it.
        dt_range: step sizes at initialisation, see :class:`medmamba.mixers.routed.RoutedScan`.
        fusion: joins the results of the routes, (B, K, L, E) in the volume's order -> (B, L, E); default: their sum.
        head_width: P; where it does not divide the width, its largest divisor below.
        parameters: which routes share weights, as in :class:`medmamba.mixers.scan.ScanCore`.

    Raises:
        ValueError: a ``head_width`` below 1, and as :class:`medmamba.mixers.routed.RoutedScan`.

    Source: Dao & Gu, "Transformers are SSMs", 2024, arXiv:2405.21060, sections 5 and 7.
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
        head_width: int = HEAD_WIDTH,
        parameters: str = "route",
    ):
        super().__init__(d_state, routes, dt_range, parameters)
        self.fusion = fusion
        self.heads = heads_of(width, head_width)
        count = len(self.dt_ranges)
        self.x_proj = nn.Parameter(torch.empty(count, self.heads + 2 * d_state, width))
        self.dt_bias = exempt_from_decay(nn.Parameter(torch.empty(count, self.heads)))
        self.A_log = exempt_from_decay(nn.Parameter(torch.empty(count, self.heads)))
        self.D = exempt_from_decay(nn.Parameter(torch.ones(count, width)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values (see the class docstring)."""
        bound = 1.0 / math.sqrt(self.x_proj.shape[-1])  # torch's default for a Linear layer of this input width
        self.x_proj.uniform_(-bound, bound)
        self._draw_step_sizes()
        self.A_log.uniform_(*_RATES).log_()

    def step_sizes(self, u: Tensor) -> Tensor:
        """What the scan multiplies A with, for tokens (B, L, E) in raster order: dt (B, L, K, H), positive."""
        dt = F.softplus(torch.einsum("ble,khe->blkh", u, self.x_proj[:, : self.heads]) + self.dt_bias)
        return self.per_route(dt, dim=2)

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`."""
        u = keep(u, mask)
        batch, length, _ = u.shape
        count, rows, width = self.x_proj.shape
        projected = F.linear(u, self.x_proj.view(count * rows, width)).view(batch, length, count, rows)
        dt, B, C = self.per_route(projected, dim=2).split([self.heads, self.d_state, self.d_state], dim=-1)
        if self.fusion is not None:
            # As in ScanCore: what sets the routes apart is small against what they share.
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
            dt_mask=mask,
            merge="sum" if self.fusion is None else "none",
        )
        return y if self.fusion is None else self.fusion(y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}"


def heads_of(width: int, head_width: int) -> int:
    """Number of heads of ``width`` channels: the heads are as wide as ``head_width``, or its largest divisor below.

    Raises:
        ValueError: a head width below 1.
    """
    if head_width < 1:
        raise ValueError(f"head_width must be at least 1 channel, got {head_width}")
    return next(width // size for size in range(min(head_width, width), 0, -1) if width % size == 0)
