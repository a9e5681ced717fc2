"""The block: residual parts, one after the other, on tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.layers import DropPath, Place
from medmamba.mixers.mask import keep
from medmamba.mixers.volume import TokenConv
from medmamba_kernels import Route

from .assign import ASSIGNMENTS
from .channel_mix import CHANNEL_MIXES
from .grids import GRIDS
from .local import LOCALS, Beside, MultiKernel
from .merges import MERGES
from .modulation import SqueezeExcite
from .options import BlockOptions
from .token_mixer import TokenMixer
from .tokens import Chain, Grid, PerToken, grid_of

#: sigmoid(this) is the share of the branch in a convex sum at first: one half, as published.
_CONVEX_START = 1e-4
_LAYER_SCALE_START = 0.1


class Residual(nn.Module):
    """u joined with a branch of it. (B, L, C) tokens -> same.

    ============  =============================================================================
    "add"         u + branch(norm(u))
    "convex"      (1 - s) u + s branch(norm(u)), s = sigmoid(alpha) per channel
    "scaled"      u + g branch(norm(u)), g per channel, 0.1 at first (LayerScale)
    ============  =============================================================================

    Args:
        width: C.
        branch: a part.
        kind: of the table.
        has_norm: LayerNorm in front of the branch.
        drop_path: rate of stochastic depth of the branch.

    Source: "convex": Lee et al., "EfficientViM", 2024, arXiv:2411.15241; "scaled": Touvron et al., "Going Deeper with
    Image Transformers", 2021, arXiv:2103.17239.
    """

    def __init__(self, width: int, branch: nn.Module, *, kind: str, has_norm: bool = True, drop_path: float = 0.0):
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(width) if has_norm else nn.Identity()
        self.branch = branch
        self.drop_path = DropPath(drop_path)
        start = {"convex": _CONVEX_START, "scaled": _LAYER_SCALE_START}
        self.weight = nn.Parameter(torch.full((width,), start[kind])) if kind in start else None

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        y = self.branch(self.norm(u), grid, mask=mask)
        if self.weight is None:
            return keep(u + self.drop_path(y), mask)
        if self.kind == "scaled":
            return keep(u + self.drop_path(self.weight * y), mask)
        return keep(u + self.drop_path(torch.sigmoid(self.weight) * (y - u)), mask)


class MixerBlock(nn.Module):
    """Parts one after the other on a feature map. (B, *spatial, C) channels last -> same, two or three axes.

    Args:
        parts: modules ``(u, grid, *, mask=None)`` on (B, L, C) tokens.
    """

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        grid = grid_of(x.shape[1:-1])
        u = x.flatten(1, -2)
        for part in self.parts:
            u = part(u, grid)
        return u.view(x.shape)


def mixer_block(
    width: int, *, options: BlockOptions, place: Place, core: Callable[..., nn.Module] | None, drop_path: float = 0.0
) -> MixerBlock:
    """The block that the options describe, at its place.

    Args:
        width: C.
        options: choices that hold here (:meth:`BlockOptions.at`).
        place: where it stands.
        core: ``core(E, dt_rank=..., routes=..., kernel_size=..., fusion=...)`` builds the token mixer; None leaves the
            mixing of tokens out.
        drop_path: rate of stochastic depth.

    Raises:
        ValueError: choices that contradict each other, or do not fit the width.
    """
    residual = partial(Residual, width, kind=options.residual, drop_path=drop_path)
    position = _position(width, options, place)
    parts = position()
    channel_mix = None
    if options.channel_mix is not None:
        channel_mix = CHANNEL_MIXES[options.channel_mix](width, place, options.channel_ratio)
    if core is not None:
        mixer = _token_mixer(width, options, place, core)
        if channel_mix is not None and options.one_residual:
            one = Chain(mixer, PerToken(nn.LayerNorm(width)), channel_mix)
            return MixerBlock(*parts, residual(one, has_norm=False))
        parts.append(residual(mixer, has_norm=options.before is None))
        parts += position() if options.position_twice else []
    return MixerBlock(*parts, *([] if channel_mix is None else [residual(channel_mix)]))


def _token_mixer(width: int, options: BlockOptions, place: Place, core: Callable[..., nn.Module]) -> nn.Module:
    """The mixing with all that stands in front of it or beside it inside the residual."""
    mixer: nn.Module = TokenMixer(
        width,
        expand=options.expand,
        local=None if options.local is None else partial(LOCALS[options.local], place=place),
        mixing=_mixing(options, place, partial(core, dt_rank=math.ceil(width / 16))),
        has_norm=options.norm,
        modulation=options.modulation,
        gate=options.gate,
    )
    if options.beside:
        mixer = Beside(width, place, mixer, SqueezeExcite)
    if options.before is None:
        return mixer
    return Chain(LOCALS[options.before](width, place), PerToken(nn.LayerNorm(width)), mixer)


def _position(width: int, options: BlockOptions, place: Place) -> Callable[[], list[nn.Module]]:
    """Builds what stands in front of a residual part: nothing, a convolution with a residual, or several."""

    def build() -> list[nn.Module]:
        if options.position is None:
            return []
        if options.position == "multi_kernel":
            return [MultiKernel(width, place)]
        return [Residual(width, TokenConv(width, place.kernel(3)), kind=options.residual, has_norm=False)]

    return build


def _mixing(options: BlockOptions, place: Place, core: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    """Grid over assignment over merge over core."""

    def build_core(width: int, routes: Sequence[Route], **kwargs: Any) -> nn.Module:
        return core(width, routes=[str(route) for route in routes], kernel_size=place.kernel_size, **kwargs)

    def merged(width: int, routes: Sequence[Route]) -> nn.Module:
        return MERGES[options.merge](width, routes, build_core)

    def assigned(width: int, routes: Sequence[Route]) -> nn.Module:
        return ASSIGNMENTS[options.assign](width, routes, merged, options.groups)

    def mixing(width: int) -> nn.Module:
        return GRIDS[options.grid](width, options.routes_at(place), place, assigned)

    return mixing
