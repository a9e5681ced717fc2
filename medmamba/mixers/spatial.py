"""Spatial-Mamba's mixer: neighbours in the volume share their states before the states are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.convolution import CONV
from medmamba.layers.parameters import exempt_from_decay
from medmamba_kernels import selective_scan

from .mask import keep
from .precision import float16_in_float32
from .routed import RoutedScan
from .step_sizes import DtRange
from .volume import as_tokens


class SpatialCore(RoutedScan):
    """S6 with one state, whose states are fused by dilated depthwise convolutions before they are read.

    Per route k, with u the tokens in that route's order and one state per channel::

        (r, B) = P_k u            dt = softplus(Q_k r + bias_k)
        h_t = exp(dt A_k) h_{t-1} + dt u_t B_t

    and on the grid, with h the sum of the routes' states::

        h' = sum over dilations of conv(h)          y = h' (c . u) + D u

    The published operator has the single route ``dhw``. Parameters, for S sets of weights: ``state_proj`` (S, R + 1, E)
    = P, ``dt_proj`` (S, E, R) = Q, ``dt_bias`` (S, E), ``A_log`` (S, E, 1), ``C_proj`` (1, E) = c, ``D`` (E,), and
    ``state_fusion``. Initialised as :class:`medmamba.mixers.scan.ScanCore` with N = 1.

    Args:
        width: E, channels of the tokens.
        d_state: ignored: a state is a number per channel, else the fusion would hold N volumes.
        routes: name of a route set, or a list of routes.
        dt_rank: R, rank of the step size projection.
        kernel_size: of the network's convolutions at this place, one entry per axis of the image; along an axis with 1
            states are not fused.
        dt_range: step sizes at initialisation, see :class:`medmamba.mixers.routed.RoutedScan`.
        fusion: ignored: what the routes have in common is a sum of states.
        parameters: which routes share weights, as in :class:`medmamba.mixers.scan.ScanCore`.
        dilations: of the convolutions.
        spacing: of the tokens, one number per axis of the image in any unit; along coarser axes dilations are smaller.

    Raises:
        ValueError: dilations or spacings that are not positive, a spacing of another number of axes than the image,
            and as :class:`medmamba.mixers.routed.RoutedScan`.

    Source: Xiao et al., "Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion", 2024,
    arXiv:2410.15091.
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
        dilations: Sequence[int] = (1, 3, 5),
        spacing: Sequence[float] | None = None,
    ):
        super().__init__(1, routes, dt_range, parameters)
        count = len(self.dt_ranges)
        self.dt_rank = dt_rank
        self.state_proj = nn.Parameter(torch.empty(count, dt_rank + 1, width))
        self.dt_proj = nn.Parameter(torch.empty(count, width, dt_rank))
        self.dt_bias = exempt_from_decay(nn.Parameter(torch.empty(count, width)))
        self.A_log = exempt_from_decay(nn.Parameter(torch.zeros(count, width, 1)))
        self.C_proj = nn.Parameter(torch.empty(1, width))
        self.D = exempt_from_decay(nn.Parameter(torch.ones(width)))
        self.state_fusion = StateFusion(width, kernel_size, dilations=dilations, spacing=spacing)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values (see the class docstring)."""
        bound = 1.0 / math.sqrt(self.state_proj.shape[-1])  # torch's default for a Linear layer of this input width
        self.state_proj.uniform_(-bound, bound)
        self.C_proj.uniform_(-bound, bound)
        self.dt_proj.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self._draw_step_sizes()

    def step_sizes(self, u: Tensor) -> Tensor:
        """What the scan multiplies A with, for tokens (B, L, E) in raster order: dt (B, L, K, E), positive."""
        r = torch.einsum("ble,kre->blkr", u, self.state_proj[:, : self.dt_rank])
        dt = F.softplus(torch.einsum("blkr,ker->blke", r, self.dt_proj) + self.dt_bias)
        return self.per_route(dt, dim=2)

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`.

        States of masked tokens are zeros to the convolutions. Answers float16 in float32.
        """
        u, precision = float16_in_float32(keep(u, mask), self.C_proj)
        with precision:
            # The scan answers float16 in float32, which convolutions of a module in half precision do not take.
            fused = self.state_fusion(self.states(u, grid, mask).to(u.dtype), grid)
            return keep(fused * F.linear(u, self.C_proj) + u * self.D, mask)

    def states(self, u: Tensor, grid: tuple[int, int, int], mask: Tensor | None = None) -> Tensor:
        """The states after every token, summed over the routes: (B, L, E), in raster order."""
        batch, length, _ = u.shape
        count, rows, width = self.state_proj.shape
        projected = F.linear(u, self.state_proj.view(count * rows, width)).view(batch, length, count, rows)
        dt, B = self.per_route(projected, dim=2).split([self.dt_rank, 1], dim=-1)
        return selective_scan(
            u,
            dt,
            self.per_route(-torch.exp(self.A_log)),
            B,
            torch.ones_like(B),  # reads the state itself
            routes=self.routes,
            grid=grid,
            dt_bias=self.per_route(self.dt_bias),
            dt_weight=self.per_route(self.dt_proj),
            dt_mask=mask,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dt_rank={self.dt_rank}"


class StateFusion(nn.Module):
    """Sum of depthwise convolutions of several dilations; beyond the border the nearest token counts. (B, L, E) -> same

    A kernel has 3 taps along every axis that the network's convolutions have here, and along axis a the dilation
    max(1, round(d s_min / s_a)) for tokens of spacing s. All taps start as one over their number, a mean: ones, as
    published, with a learned factor per dilation that the kernels here hold themselves, multiply the states by 81.

    The published code merges the kernels into one for evaluation and keeps it while training goes on: here every call
    reads the weights as they are.

    Args:
        width: E.
        kernel_size: of the network's convolutions, one entry per axis of the image.
        dilations: one convolution for each.
        spacing: per axis of the image; default: all the same.

    Raises:
        ValueError: as :class:`SpatialCore`.
    """

    def __init__(
        self, width: int, kernel_size: Sequence[int], *, dilations: Sequence[int], spacing: Sequence[float] | None
    ):
        super().__init__()
        self.axes = len(kernel_size)
        taps = [3 if size > 1 else 1 for size in kernel_size]
        self.dilations = _dilations_per_axis(dilations, spacing, taps)
        #: Tokens that each convolution reaches beyond its own, per axis.
        self.reaches = [[d * (t // 2) for d, t in zip(each, taps, strict=True)] for each in self.dilations]
        self.convs = nn.ModuleList(
            CONV[self.axes](width, width, taps, dilation=each, groups=width, bias=False) for each in self.dilations
        )
        for weight in self.convs.parameters():
            nn.init.constant_(weight, 1 / (math.prod(taps) * len(self.convs)))

    def forward(self, h: Tensor, grid: tuple[int, int, int]) -> Tensor:
        # Padded once, for the largest reach; the other convolutions read a part of it.
        margin = [max(along) for along in zip(*self.reaches, strict=True)]
        padded = _with_border(h.unflatten(1, grid[-self.axes :]), margin).movedim(-1, 1)
        parts = (
            module(_cut(padded, [m - r for m, r in zip(margin, reach, strict=True)]))
            for module, reach in zip(self.convs, self.reaches, strict=True)
        )
        return as_tokens(reduce(torch.add, parts))


def _with_border(x: Tensor, margin: Sequence[int]) -> Tensor:
    """(B, *spatial, E) with the outermost tokens repeated so many times on both sides of each axis."""
    # Not torch's padding, whose gradient is added up in an order that differs from run to run on GPUs.
    for axis, count in enumerate(margin, start=1):
        if count:
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
            repeats = [count if a == axis else -1 for a in range(x.dim())]
            x = torch.cat([first.expand(repeats), x, last.expand(repeats)], axis)
    return x


def _cut(volume: Tensor, margin: Sequence[int]) -> Tensor:
    """(B, E, *spatial) without so many tokens on both sides of each axis, a view."""
    for axis, count in enumerate(margin, start=2):
        volume = volume.narrow(axis, count, volume.shape[axis] - 2 * count)
    return volume


def _dilations_per_axis(
    dilations: Sequence[int], spacing: Sequence[float] | None, taps: Sequence[int]
) -> list[tuple[int, ...]]:
    """One dilation per axis of the image for each convolution: max(1, round(d s_min / s_a)); 1 along a single tap."""
    spacing = [1.0] * len(taps) if spacing is None else list(spacing)
    if len(spacing) != len(taps) or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing must be {len(taps)} positive numbers, one per axis of the image, got {spacing}")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations must be whole numbers of at least 1, got {list(dilations)}")
    finest = min(spacing)
    # Six digits first: whether a half goes up or down must not hang on the unit of the spacing.
    return [
        tuple(max(1, round(round(d * finest / s, 6))) if t > 1 else 1 for s, t in zip(spacing, taps, strict=True))
        for d in dilations
    ]
