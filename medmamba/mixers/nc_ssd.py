"""VSSD's mixer: a state without order, to which every token adds by its weight and which every token reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.parameters import exempt_from_decay

from .mask import keep
from .pooling import sum_over_tokens
from .precision import float16_in_float32
from .ssd import HEAD_WIDTH, heads_of
from .step_sizes import DtRange, inverse_softplus_of_log_uniform
from .volume import TokenConv

#: Below this the weights of all tokens together count as none; float32 still divides by it.
_TINY = 1e-30


class NonCausalCore(nn.Module):
    """NC-SSD, normalised: one state for all tokens, their mean by a weight per head; without order, linear in L.

    Per head of P neighbouring channels::

        (B, C) = SiLU(conv(P u)), N channels each        w_l = softplus(Q u_l + bias)
        G = sum over l of w_l B_l u_l / sum over l of w_l            y_l = C_l G + D u_l

    The published code leaves out the division: its result grows with the number of tokens, and D u vanishes beside it.
    With the division the published decay rate |A|, a factor of w, cancels and is left out. The convolution of u itself
    in front of the mixer, and the norm and gate behind it, are the block's business.

    Parameters, for H = E / P heads: ``proj`` = P (E -> 2N), ``local`` depthwise convolution of 2N channels with bias,
    ``dt_proj`` = Q (E -> H), ``dt_bias`` (H,) with softplus(bias) log-uniform in Mamba's range, ``D`` (H,) ones.

    Args:
        width: E, channels of the tokens.
        d_state: N; the published networks have 64 and 48. On one CPU core 64 channels at 48 x 48 x 48 took 173 ms with
            N = 64, mostly for convolution and projection, and 47 ms with N = 16.
        kernel_size: of the convolution, one entry per axis of the image.
        head_width: P; where it does not divide the width, its largest divisor below.
        dt_rank, routes, dt_range, fusion: ignored: there is no order, no step and nothing to fuse.

    Raises:
        ValueError: a ``head_width`` below 1.

    Source: Shi, Dong, Li & Xu, "VSSD: Vision Mamba with Non-Causal State Space Duality", 2024, arXiv:2407.18559.
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
    ):
        super().__init__()
        self.d_state = d_state
        self.heads = heads_of(width, head_width)
        self.proj = nn.Linear(width, 2 * d_state, bias=False)
        self.local = TokenConv(2 * d_state, kernel_size, bias=True)
        self.act = nn.SiLU()
        self.dt_proj = nn.Linear(width, self.heads, bias=False)
        self.dt_bias = exempt_from_decay(nn.Parameter(inverse_softplus_of_log_uniform(self.heads, 1, None)[0]))
        self.D = exempt_from_decay(nn.Parameter(torch.ones(self.heads)))

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`.

        Answers float16 in float32.
        """
        u, precision = float16_in_float32(keep(u, mask), self.proj.weight)
        with precision:
            B, C = self.act(self.local(self.proj(u), grid)).chunk(2, dim=-1)
            state = sum_over_tokens(B, self._weighted(u, mask)).to(C.dtype)
            return keep(C @ state + u * self._per_channel(self.D), mask)

    def _weighted(self, u: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens times their share of the weight of all, per head; (B, L, E) in float32 or float64."""
        wide = torch.promote_types(u.dtype, torch.float32)
        weight = keep(F.softplus(self.dt_proj(u).to(wide) + self.dt_bias), mask)
        share = weight / weight.sum(1, keepdim=True).clamp_min(_TINY)
        return u * self._per_channel(share)

    def _per_channel(self, per_head: Tensor) -> Tensor:
        """(..., H) -> (..., E)."""
        return per_head.repeat_interleave(self.proj.in_features // self.heads, dim=-1)

    def extra_repr(self) -> str:
        return f"width={self.proj.in_features}, d_state={self.d_state}, heads={self.heads}"
