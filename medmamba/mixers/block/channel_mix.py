"""What follows the mixing of tokens, between the channels. (B, L, C) tokens -> same."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from medmamba.layers import Place
from medmamba.mixers.volume import TokenConv

from .tokens import Chain, Grid, PerToken


def mlp(width: int, place: Place, ratio: float) -> nn.Module:
    """Linear to ``ratio`` times the width, GELU, Linear back."""
    hidden = int(ratio * width)
    return PerToken(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class ConvFFN(nn.Module):
    """W2 GELU(v + depthwise convolution of v) with v = W1 x.

    Source: Shi et al., "Multi-Scale VMamba", 2024, arXiv:2405.14174; Wang et al., "PVT v2", 2021, arXiv:2106.13797.
    """

    def __init__(self, width: int, place: Place, ratio: float):
        super().__init__()
        hidden = int(ratio * width)
        self.fc1 = nn.Linear(width, hidden)
        self.conv = TokenConv(hidden, place.kernel(3))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        v = self.fc1(u)
        return self.fc2(self.act(v + self.conv(v, grid, mask=mask)))


class ConvGLU(nn.Module):
    """W2 (GELU(x + depthwise convolution of x) * v) with (x, v) = W1 u; two thirds of ``ratio``, as GLUs have.

    Source: Wang et al., "Mamba YOLO", 2024, arXiv:2406.05835 (RGBlock); Shi, "TransNeXt", 2023, arXiv:2311.17132.
    """

    def __init__(self, width: int, place: Place, ratio: float):
        super().__init__()
        hidden = max(1, int(ratio * width * 2 / 3))
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.conv = TokenConv(hidden, place.kernel(3))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        x, v = self.fc1(u).chunk(2, dim=-1)
        return self.fc2(self.act(x + self.conv(x, grid, mask=mask)) * v)


def inverted_residual(width: int, place: Place, ratio: float) -> nn.Module:
    """Linear to ``ratio`` times the width, depthwise convolution, Linear back, GELU in between.

    Source: Sandler et al., "MobileNetV2", 2018, arXiv:1801.04381 (BatchNorm and ReLU6 there).
    """
    hidden = int(ratio * width)
    return Chain(
        PerToken(nn.Linear(width, hidden), nn.GELU()),
        TokenConv(hidden, place.kernel(3)),
        PerToken(nn.GELU(), nn.Linear(hidden, width)),
    )


CHANNEL_MIXES: dict[str, Callable[[int, Place, float], nn.Module]] = {
    "conv_ffn": ConvFFN,
    "conv_glu": ConvGLU,
    "inverted_residual": inverted_residual,
    "mlp": mlp,
}
