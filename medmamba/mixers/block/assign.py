"""Which channels a route reads: all of them, a group, one half, or streams that take turns.

An assignment builds a mixing from ``mixing(width, routes)``, the routes and the number of groups or streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from medmamba_kernels import Route

from .modulation import SqueezeExcite
from .tokens import Grid

Mixing = Callable[[int, Sequence[Route]], nn.Module]


def every_channel(width: int, routes: Sequence[Route], mixing: Mixing, groups: int | None) -> nn.Module:
    """Each route reads all channels."""
    return mixing(width, routes)


class Grouped(nn.Module):
    """Groups of channels with routes of their own: one scan over L E elements in all, instead of one per route.

    Group g of G gets the routes g, g + G, ...; G is the number of routes by default. Widths differ by one channel where
    G does not divide E.

    Raises:
        ValueError: more groups than routes or channels.

    Source: Shaker et al., "GroupMamba", 2024, arXiv:2407.13772.
    """

    def __init__(self, width: int, routes: Sequence[Route], mixing: Mixing, groups: int | None):
        super().__init__()
        count = groups or len(routes)
        if not 1 <= count <= min(width, len(routes)):
            raise ValueError(f"{count} groups cannot share {width} channels and {len(routes)} routes; use fewer groups")
        bounds = [width * i // count for i in range(count + 1)]
        self.widths = [high - low for low, high in pairwise(bounds)]
        self.mixings = nn.ModuleList(mixing(w, routes[g::count]) for g, w in enumerate(self.widths))

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        parts = u.split(self.widths, dim=-1)
        mixed = [mixing(part, grid, mask=mask) for mixing, part in zip(self.mixings, parts, strict=True)]
        return torch.cat(mixed, dim=-1)


class Half(nn.Module):
    """Half of the channels are scanned, the others weighted by squeeze and excitation: half the cost of the scan.

    Source: Ma et al., "FER-YOLO-Mamba", 2024, arXiv:2405.01828.

    Raises:
        ValueError: a single channel.
    """

    def __init__(self, width: int, routes: Sequence[Route], mixing: Mixing, groups: int | None):
        super().__init__()
        if width < 2:
            raise ValueError(f"{width} channel cannot be halved; use assign 'all'")
        self.widths = [width - width // 2, width // 2]
        self.mixing = mixing(self.widths[0], routes)
        self.beside = SqueezeExcite(self.widths[1])

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        scanned, weighted = u.split(self.widths, dim=-1)
        return torch.cat([self.mixing(scanned, grid, mask=mask), self.beside(weighted, grid, mask=mask)], dim=-1)


class Streams(nn.Module):
    """M streams of E / M channels, interleaved voxel by voxel along the fastest axis: a sequence of M L tokens.

    A voxel's streams are neighbours in every sequence, and share the weights of the scan. Results of routes with
    different fastest axes are added.

    Source: Zhang et al., "VFIMamba", 2024, arXiv:2407.02315 (two frames; interleaved along rows and along columns).

    Raises:
        ValueError: M does not divide the width; or M is not given.
    """

    def __init__(self, width: int, routes: Sequence[Route], mixing: Mixing, groups: int | None):
        super().__init__()
        if groups is None or groups < 2 or width % groups:
            raise ValueError(
                f"{width} channels cannot be read as {groups} streams; choose groups = 2 or more, a divisor"
            )
        self.streams = groups
        self.axes = ["dhw".index(axis) for axis in dict.fromkeys(route.axes[-1] for route in routes)]
        self.mixings = nn.ModuleList(
            mixing(width // groups, [route for route in routes if route.axes[-1] == "dhw"[axis]]) for axis in self.axes
        )

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        results = [
            self._along(u, grid, mask, axis, mixing) for axis, mixing in zip(self.axes, self.mixings, strict=True)
        ]
        return torch.stack(results).sum(0)

    def _along(self, u: Tensor, grid: Grid, mask: Tensor | None, axis: int, mixing: nn.Module) -> Tensor:
        longer = [n * self.streams if a == axis else n for a, n in enumerate(grid)]
        # (B, D, H, W, M, e) with M moved behind the axis.
        woven = u.unflatten(-1, (self.streams, -1)).unflatten(1, grid).movedim(4, axis + 2)
        woven_mask = None
        if mask is not None:
            shape = [mask.shape[0], *grid]
            woven_mask = mask.view(shape).repeat_interleave(self.streams, dim=axis + 1).flatten(1)
        y = mixing(woven.reshape(u.shape[0], -1, woven.shape[-1]), tuple(longer), mask=woven_mask)
        y = y.reshape(woven.shape).movedim(axis + 2, 4)
        return y.reshape(u.shape)


ASSIGNMENTS: dict[str, Callable[[int, Sequence[Route], Mixing, int | None], nn.Module]] = {
    "all": every_channel,
    "group": Grouped,
    "half": Half,
    "streams": Streams,
}
