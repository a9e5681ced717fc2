"""Small parts that blocks are made of: chains, what works token by token, means of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmamba.mixers.mask import keep

Grid = tuple[int, int, int]


def grid_of(spatial: Sequence[int]) -> Grid:
    """(D, H, W) of two or three spatial sizes; an image has D = 1."""
    depth, height, width = (1,) * (3 - len(spatial)) + tuple(spatial)
    return depth, height, width


class PerToken(nn.Module):
    """Modules that work token by token, one after the other, called like a part of a block."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        return keep(self.body(u), mask)


class Chain(nn.Module):
    """Parts one after the other."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        for part in self.parts:
            u = part(u, grid, mask=mask)
        return u


def token_mean(u: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, C) -> (B, 1, C): mean over the tokens that take part, 0 where none does; summed in float32 or better."""
    wide = keep(u, mask).to(torch.promote_types(u.dtype, torch.float32))
    if mask is None:
        return wide.mean(1, keepdim=True).to(u.dtype)
    count = mask.sum(1).clamp_min(1).view(-1, 1, 1)
    return (wide.sum(1, keepdim=True) / count).to(u.dtype)
