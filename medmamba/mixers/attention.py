"""Softmax attention over all tokens, for the coarse stages of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.layers.parameters import exempt_from_decay

from .mask import keep
from .precision import result_dtype


class AttentionCore(nn.Module):
    """Multi-head softmax attention over the tokens, and a skip per channel: what a scan approximates, where it fits.

    Per head, with d channels::

        (q, k, v) = W u          y_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j + D * u_i

    W (3 E, E) has no bias; D starts at 1. Positions are not coded: order comes from the convolutions around. Before
    training the sum is close to the mean of all tokens, which shrinks with their number; with D the result does not.
    The projection behind the heads is the block's own.

    Args:
        width: E.
        d_state, dt_rank, routes, kernel_size, dt_range, fusion: of a scan; ignored.
        head_width: least channels of a head. E is divided into as many heads as that allows, all of the same width.
        max_tokens: most tokens; time grows with their square.

    Raises:
        ValueError: a width or a budget below 1. From a forward pass: more tokens than ``max_tokens``.

    Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; among state-space layers only where
    tokens are few: Waleffe et al., 2024, arXiv:2406.07887.
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int,
        dt_rank: int,
        routes: str | Sequence[str],
        kernel_size: Sequence[int] = (3, 3, 3),
        dt_range: Sequence[float] | Sequence[Sequence[float]] | None = None,
        fusion: Callable[[Tensor], Tensor] | None = None,
        head_width: int = 32,
        max_tokens: int = 4096,
    ):
        super().__init__()
        if head_width < 1 or max_tokens < 1:
            raise ValueError(f"head_width and max_tokens must be 1 or more, got {head_width} and {max_tokens}")
        self.heads = next((n for n in range(width // head_width, 1, -1) if width % n == 0), 1)
        self.max_tokens = max_tokens
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.D = exempt_from_decay(nn.Parameter(torch.ones(width)))

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`.

        The softmax is in float32 at least. Answers in the dtype of u, float16 in float32.
        """
        batch, length, width = u.shape
        if length > self.max_tokens:
            raise ValueError(
                f"attention over {length} tokens ({'x'.join(map(str, grid))}) is above max_tokens={self.max_tokens}; "
                "use it at deeper stages, which have fewer tokens, or raise max_tokens"
            )
        u = keep(u, mask)
        q, k, v = self.qkv(u).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else _seen(mask))
        y = y.transpose(1, 2).reshape(batch, length, width).to(result_dtype(u))
        return keep(y + u * self.D.to(y.dtype), mask)


def _seen(mask: Tensor) -> Tensor:
    """(B, L) -> (B, 1, 1, L), the keys that every query sees: the tokens that take part, or all where there are none.

    A softmax over nothing is NaN in some of torch's backends. Over tokens of zeros it is zero.
    """
    return (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]
