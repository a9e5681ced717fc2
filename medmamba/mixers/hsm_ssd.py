"""EfficientViM's mixer: tokens are pooled into N latents, channels are mixed there, and every token reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.parameters import exempt_from_decay

from .mask import keep
from .pooling import sum_over_tokens
from .precision import at_least_float32, float16_in_float32
from .step_sizes import DtRange
from .volume import TokenConv


class HiddenStateMixerCore(nn.Module):
    """HSM-SSD: mixes channels on N pooled latents instead of L tokens; without order, of any size, linear in L.

    With weights over the tokens that sum to 1, so that the result does not grow with their number::

        (B, C, dt) = conv(P u), N channels each          H = sum over tokens l of (softmax_L(dt) * B)_l u_l
        (h, g) = Q H,  H' = R (h * SiLU(g) + D h)        y_l = sum over latents n of C_ln H'_n

    Parameters: ``proj`` = P (E -> 3N), ``local`` depthwise convolution of 3N channels, ``in_proj`` = Q (E -> 2E),
    ``out_proj`` = R (E -> E), ``D`` (1,), none with a bias: that of dt would vanish in the softmax, as does the decay
    rate A per latent of the published code, which is therefore left out.

    Args:
        width: E, channels of the tokens.
        d_state: N, latents.
        kernel_size: of the convolution, one entry per axis of the image.
        skip: with the term D h.
        dt_rank, routes, dt_range, fusion: ignored: there is no order, no step and nothing to fuse.

    Source: Lee, Choi & Kim, "EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality",
    2024, arXiv:2411.15241.
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
        skip: bool = True,
    ):
        super().__init__()
        self.d_state = d_state
        self.proj = nn.Linear(width, 3 * d_state, bias=False)
        self.local = TokenConv(3 * d_state, kernel_size, bias=False)
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.act = nn.SiLU()
        self.out_proj = nn.Linear(width, width, bias=False)
        self.D = exempt_from_decay(nn.Parameter(torch.ones(1))) if skip else None

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`.

        Answers float16 in float32.
        """
        u, precision = float16_in_float32(keep(u, mask), self.proj.weight)
        with precision:
            B, C, dt = self.local(self.proj(u), grid).chunk(3, dim=-1)
            latents = self.mix(sum_over_tokens(_shares(dt, mask) * B, u).to(u.dtype))
            return keep(C @ latents.to(C.dtype), mask)

    def mix(self, latents: Tensor) -> Tensor:
        """Gated mixing of the channels of each latent, (B, N, E) -> (B, N, E)."""
        h, g = self.in_proj(latents).chunk(2, dim=-1)
        gated = h * self.act(g)
        return self.out_proj(gated if self.D is None else gated + self.D * h)

    def extra_repr(self) -> str:
        return f"width={self.out_proj.out_features}, d_state={self.d_state}"


def _shares(dt: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the tokens that take part, (B, L, N) in float32 or float64; 0 for the others."""
    dt = at_least_float32(dt)
    if mask is not None:
        # Finite, for a gradient without NaN where a sample has no token at all.
        dt = dt.masked_fill(~mask.unsqueeze(-1), torch.finfo(dt.dtype).min)
    return keep(F.softmax(dt, dim=1), mask)
