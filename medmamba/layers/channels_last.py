"""The border between convolution stages (channels first) and scan stages (channels last)."""

from __future__ import annotations

from torch import Tensor, nn


class ChannelsLast(nn.Module):
    """Run modules that work on (B, *spatial, C) inside a network that works on (B, C, *spatial).

    Both permutations are views: between two such modules nothing is copied.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.movedim(1, -1)).movedim(-1, 1)
