"""Several cores side by side, each on its own slice of the channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .mask import keep


class MultiHeadCore(nn.Module):
    """Every head reads its own slice of a projection along its own routes; the slices are joined again.

    With n heads of width s = floor(E / n)::

        (u_1 ... u_n) = split(W u)        y_i = core_i(u_i)        out = V LayerNorm(y_1 ... y_n)

    ``W`` (n s, E) and ``V`` (E, n s) have no bias. (B, L, E) -> (B, L, E).

    Args:
        width: E.
        core: builds the mixer of one head from ``(s, dt_rank=..., routes=..., kernel_size=...)``; dt_rank is
            ceil(s / 16).
        routes: one entry per head, handed to its core.
        kernel_size: of the network's convolutions at this place, per axis.

    Raises:
        ValueError: no head, or more heads than channels.

    Source: Ji, "MHS-VM", 2024, arXiv:2406.05992 (multi-head scan module).
    """

    def __init__(
        self,
        width: int,
        *,
        core: Callable[..., nn.Module],
        routes: Sequence[str | Sequence[str]],
        kernel_size: Sequence[int] = (3, 3, 3),
    ):
        super().__init__()
        count = len(routes)
        if not 1 <= count <= width:
            raise ValueError(f"{count} heads cannot share {width} channels; use from 1 head to as many as channels")
        self.head_width = width // count
        joined = count * self.head_width
        self.split_proj = nn.Linear(width, joined, bias=False)
        rank = math.ceil(self.head_width / 16)
        self.heads = nn.ModuleList(
            core(self.head_width, dt_rank=rank, routes=each, kernel_size=kernel_size) for each in routes
        )
        self.norm = nn.LayerNorm(joined)
        self.join_proj = nn.Linear(joined, width, bias=False)

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`."""
        slices = self.split_proj(keep(u, mask)).split(self.head_width, dim=-1)
        y = torch.cat([head(part, grid, mask=mask) for head, part in zip(self.heads, slices, strict=True)], dim=-1)
        return keep(self.join_proj(self.norm(y)), mask)
