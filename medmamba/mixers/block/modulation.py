"""Channel weights from the mean over all tokens: of the result itself, or of what the block read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medmamba.mixers.mask import keep

from .tokens import Grid, token_mean


class ChannelAttention(nn.Module):
    """(B, 1, C) weights sigmoid(W2 act(W1 mean)) from tokens (B, L, C).

    Args:
        width: C.
        reduction: hidden channels are C / reduction, at least 1.

    Source: Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507.
    """

    def __init__(self, width: int, reduction: int = 8):
        super().__init__()
        hidden = max(1, width // reduction)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        return torch.sigmoid(self.fc2(self.act(self.fc1(token_mean(u, mask)))))


class SqueezeExcite(nn.Module):
    """y times the channel attention of y. (B, L, C) -> same."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = ChannelAttention(width)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        return keep(u, mask) * self.attention(u, grid, mask=mask)


class AffinityModulation(nn.Module):
    """LayerNorm(s x y a(x)): the result y times the block's input x, a scalar s and the channel attention a of x.

    (B, L, C) -> same; x has the width of y.

    Source: Shaker et al., "GroupMamba", 2024, arXiv:2407.13772 (channel affinity modulation; the product with the input
    is in the released code).
    """

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.attention = ChannelAttention(width, reduction=16)
        self.norm = nn.LayerNorm(width)

    def forward(self, y: Tensor, x: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        x = keep(x, mask)
        weights = self.attention(x, grid, mask=mask)
        # A product of two activations: in half precision it would leave the range before the norm brings it back.
        wide = torch.promote_types(y.dtype, torch.float32)
        return self.norm(y.to(wide) * (self.scale * x) * weights)
