"""VMamba's block in its two published forms: v0 of VM-UNet, and v2 of MSVM-UNet (no gate, a feed-forward part).

All work on channels-last tensors (B, *spatial, C), in 2D and 3D.
Source: Liu et al., "VMamba: Visual State Space Model", 2024, arXiv:2401.10166.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .convolution import conv
from .drop_path import DropPath


class SS2D(nn.Module):
    """VMamba's operator: depthwise convolution, scan along K routes, LayerNorm; v0 has a gate, v2 has none.

    x -> in-projection to (u, z); u -> depthwise convolution, SiLU, core; LayerNorm(u) * SiLU(z) -> out-projection.
    Without a gate there is no z. (B, *spatial, d) -> same. The name is the literature's; it works in 2D and 3D.

    Args:
        width: d.
        core: builds the token mixer from ``(expanded width, dt_rank=..., kernel_size=...)``.
        kernel_size: of the depthwise convolution, per axis.
        expand: E / d.
        gate: multiply by SiLU(z) (VMamba v0); False is VMamba v2 ("noz").
        conv_bias: bias of the depthwise convolution (v0: yes, v2: no).
    """

    def __init__(
        self,
        width: int,
        *,
        core: Callable[..., nn.Module],
        kernel_size: Sequence[int],
        expand: float,
        gate: bool = True,
        conv_bias: bool = True,
    ):
        super().__init__()
        inner = int(expand * width)
        self.gate = gate
        self.in_proj = nn.Linear(width, 2 * inner if gate else inner, bias=False)
        self.conv = conv(inner, inner, kernel_size, groups=inner, bias=conv_bias)
        self.act = nn.SiLU()
        self.core = core(inner, dt_rank=math.ceil(width / 16), kernel_size=kernel_size)
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, *z = self.in_proj(x).chunk(2 if self.gate else 1, dim=-1)
        u = self.act(self.conv(u.movedim(-1, 1)).movedim(1, -1))
        batch, *spatial, inner = u.shape
        depth, height, width = (1,) * (3 - len(spatial)) + tuple(spatial)
        y = self.norm(self.core(u.reshape(batch, -1, inner), (depth, height, width)).view(u.shape))
        return self.out_proj(y * self.act(z[0]) if self.gate else y)


class VSSBlock(nn.Module):
    """x + DropPath(SS2D(LayerNorm(x))), then, if there is one, x + DropPath(FFN(LayerNorm(x))); channels last.

    Args:
        width: channels.
        ss2d: ``ss2d(width, kernel_size=...)``.
        kernel_size: of the stage, per axis.
        drop_path: rate of stochastic depth.
        feed_forward: ``feed_forward(width, kernel_size=...)``; None for VMamba v0, which has no feed-forward part.
    """

    def __init__(
        self,
        width: int,
        *,
        ss2d: Callable[..., nn.Module],
        kernel_size: Sequence[int],
        drop_path: float,
        feed_forward: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ss2d = ss2d(width, kernel_size=kernel_size)
        self.drop_path = DropPath(drop_path)
        if feed_forward is not None:
            self.ffn_norm = nn.LayerNorm(width)
            self.ffn = feed_forward(width, kernel_size=kernel_size)
        self.has_ffn = feed_forward is not None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ss2d(self.norm(x)))
        return x + self.drop_path(self.ffn(self.ffn_norm(x))) if self.has_ffn else x
