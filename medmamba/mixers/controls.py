"""Controls: what stands in the place of the scan, with the scan's number of parameters.

Each asks one question of a network with a scan. Does it need the order of the tokens (``ShuffledCore``), a long
memory (``WindowedCore``), weights that depend on the token (``LTICore``), a scan rather than a convolution
(``DepthwiseCore``), anything at all there (``IdentityCore``, which has no parameters to match)?

The scan of K routes, N states and rank R has ``K (2 R + 3 N + 2)`` weights per channel. Controls with fewer are topped
up with a linear map of low rank between the channels of a token, to less than two weights per channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.layers import conv
from medmamba.layers.parameters import exempt_from_decay
from medmamba_kernels import resolve_routes, selective_scan
from medmamba_kernels.routes import Route

from .mask import keep
from .scan import ScanCore
from .step_sizes import DtRange, inverse_softplus_of_log_uniform
from .volume import as_tokens, as_volume

#: Tokens between two resets of the windowed scan: fewer than the median state remembers at initialisation (15).
WINDOW = 8


class ShuffledCore(ScanCore):
    """The scan along one fixed random order and back, instead of along its routes: tests whether order matters.

    Arguments and parameters are those of :class:`medmamba.mixers.scan.ScanCore`; of ``routes`` only the number and the
    directions count: a reversed route becomes the way back.
    """

    def __init__(self, width: int, *, routes: str | Sequence[str], **options: Any):
        shuffled = [str(Route(curve="shuffle", reverse=route.reverse)) for route in resolve_routes(routes)]
        super().__init__(width, routes=shuffled, **options)


class WindowedCore(ScanCore):
    """The scan with its state cleared every ``WINDOW`` tokens of a route: tests whether a long memory matters.

    Arguments and parameters are those of :class:`medmamba.mixers.scan.ScanCore`. For another window name routes with a
    reset of their own, e.g. ``dhw:reset=64``, which stay as they are.
    """

    def __init__(self, width: int, *, routes: str | Sequence[str], **options: Any):
        windows = [
            str(replace(route, reset=str(WINDOW)) if route.reset == "volume" else route)
            for route in resolve_routes(routes)
        ]
        super().__init__(width, routes=windows, **options)


class LTICore(nn.Module):
    """The scan with dt, B and C the same for every token (linear, time-invariant): tests whether selection matters.

    Per route k: h_t = exp(dt_k A_k) * h_{t-1} + dt_k u_t B_k, y_t = h_t C_k + D_k u_t; summed over routes, plus a
    linear map of low rank that makes up for the projections of the scan.

    Parameters: ``dt_bias`` (K, E), ``A_log`` (K, E, N), ``B`` (K, N), ``C`` (K, N), ``D`` (K, E), ``top_up``.
    Initialised as :class:`medmamba.mixers.scan.ScanCore`; B and C normal with the variance that its projections give.

    Args: those of :class:`medmamba.mixers.scan.ScanCore`.

    Source: a diagonal state-space model; Gu et al., "On the Parameterization and Initialization of Diagonal State Space
    Models" (S4D), 2022, arXiv:2206.11893, here with the discretisation of Mamba.
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
        self.dt_bias = exempt_from_decay(nn.Parameter(inverse_softplus_of_log_uniform(width, count, dt_range)))
        rates = torch.arange(1, d_state + 1).float().expand(count, width, d_state)
        self.A_log = exempt_from_decay(nn.Parameter(torch.log(rates)))
        scale = 1 / math.sqrt(3)  # of a projection with torch's default weights, for tokens of variance 1
        self.B = nn.Parameter(torch.randn(count, d_state) * scale)
        self.C = nn.Parameter(torch.randn(count, d_state) * scale)
        self.D = exempt_from_decay(nn.Parameter(torch.ones(count, width)))
        own = sum(p.numel() for p in self.parameters())
        self.top_up = _low_rank(width, scan_parameters(width, d_state, dt_rank, count) - own)

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`."""
        u = keep(u, mask)
        batch, length, width = u.shape
        count, states = self.B.shape
        tokens = (batch, length, count)
        y = selective_scan(
            # As in ScanCore: what sets the routes apart is small against what they share.
            u if self.fusion is None else u.to(torch.promote_types(u.dtype, torch.float32)),
            # The step sizes are those of the bias alone; as a product of rank 1 with zeros they stay small.
            u.new_zeros(1, 1, 1, 1).expand(*tokens, 1),
            -torch.exp(self.A_log),
            self.B.expand(*tokens, states),
            self.C.expand(*tokens, states),
            self.D,
            routes=self.routes,
            grid=grid,
            dt_bias=self.dt_bias,
            dt_weight=u.new_zeros(count, width, 1),
            dt_mask=mask,
            merge="sum" if self.fusion is None else "none",
        )
        return (y if self.fusion is None else self.fusion(y)) + self.top_up(u)


class DepthwiseCore(nn.Module):
    """A depthwise convolution as large as the scan's parameters allow: tests whether a convolution does as well.

    The kernel is k along every axis that the network's own convolutions have at this place, k odd and as large as fits
    (7 for six routes of 16 states in 3D, 5 for one state); what is left goes into a linear map of low rank.

    Args: those of :class:`medmamba.mixers.scan.ScanCore`; ``kernel_size`` says which axes there are. There is nothing
        to fuse: one convolution stands for all routes. And:
        size: k, odd, along every axis that the network's convolutions have here, and no linear map: a plain depthwise
            convolution instead of one with the scan's number of parameters.

    Raises:
        ValueError: an even ``size``, or one below 1.
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
        size: int | None = None,
    ):
        super().__init__()
        budget = scan_parameters(width, d_state, dt_rank, len(resolve_routes(routes)))
        self.axes = len(kernel_size)
        spanned = sum(each > 1 for each in kernel_size)
        if size is not None and size < 1:
            raise ValueError(f"size of the depthwise convolution must be 1 or more, got {size}")
        k = size or 1
        while size is None and spanned and (k + 2) ** spanned + 1 <= budget // width:
            k += 2
        self.conv = conv(width, width, [k if each > 1 else 1 for each in kernel_size], groups=width)
        own = sum(p.numel() for p in self.conv.parameters())
        self.top_up = _low_rank(width, budget - own if size is None else 0)

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`."""
        u = keep(u, mask)
        return keep(as_tokens(self.conv(as_volume(u, grid, self.axes))) + self.top_up(u), mask)


def scan_parameters(width: int, d_state: int, dt_rank: int, routes: int) -> int:
    """Number of parameters of :class:`medmamba.mixers.scan.ScanCore`."""
    return width * routes * (2 * dt_rank + 3 * d_state + 2)


def _low_rank(width: int, parameters: int) -> nn.Module:
    """A linear map width -> rank -> width with at most so many parameters; none for fewer than 2 per channel."""
    rank = max(0, parameters // (2 * width))
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)) if rank else _Zero()


class _Zero(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)
