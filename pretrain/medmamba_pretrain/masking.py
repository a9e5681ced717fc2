"""Masking from the coarsest grid upward, and encoders that see only what is visible.

A unit is the total stride of a network, per axis: one token of its coarsest grid, a box of voxels in the image. Units
are drawn on that grid and repeated on every finer one (:func:`draw_units`, :func:`mask_at`), so no stride of the
network ever joins visible with masked positions. :class:`MaskedEncoder` then runs an encoder by four rules:

==================================  =========================================================================
what                                under a mask
==================================  =========================================================================
input                               masked voxels are 0 before the stem
convolution                         masked positions are 0 in front of it and behind it
norm over positions                 statistics of each sample's visible positions; 0 at masked ones
scan and what stands in its place   gets the mask of its tokens: :mod:`medmamba.mixers`
==================================  =========================================================================

Everything else works position by position or, as patch merging and pooling, within units, and needs no rule. Masked
positions are replaced (``torch.where``), never multiplied by 0, so that NaN and infinity stay behind the mask in the
gradient as well.

The scheme is that of MambaMIM (Tang et al., 2024, arXiv:2408.08070, bottom-up masking) and SparK (Tian et al.,
"Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", 2023, arXiv:2301.03580).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medmamba.layers import DropPath, FeedForward, SinCosPosition
from medmamba.networks.unet import check_divisible

Forward = Callable[..., Tensor]
#: How a module runs under a mask: (module, masks of this call) -> what replaces its forward.
Rule = Callable[[Any, "Visible"], Forward]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: Modules without children that work position by position.
_PER_POSITION = (
    nn.Identity,
    nn.Linear,
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    nn.LeakyReLU,
    nn.Dropout,
    DropPath,
    SinCosPosition,
    nn.Sequential,
    nn.ModuleList,
)


def unit_grid(patch_size: Sequence[int], total_stride: Sequence[int]) -> tuple[int, ...]:
    """Units of a patch per axis: ``patch_size / total_stride``.

    Raises:
        ValueError: a patch that is not a multiple of the total stride, or of another number of axes.
    """
    check_divisible(patch_size, total_stride)
    return tuple(size // stride for size, stride in zip(patch_size, total_stride, strict=True))


def draw_units(
    batch: int, units: Sequence[int], ratio: float, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Which units are visible, uniform among all choices of the same number, drawn for each sample on its own.

    Args:
        batch: B.
        units: grid of units, as from :func:`unit_grid`.
        ratio: share of masked units, in [0, 1). With n units, round(n (1 - ratio)) are visible, but at least 1 and,
            unless the ratio is 0, at most n - 1.
        generator: of the random numbers, on the CPU: the same seed gives the same units whatever device trains.
            Default: torch's own.

    Returns:
        (B, *units) bool on the CPU, True for visible units.

    Raises:
        ValueError: a ratio outside [0, 1), a grid of a single unit that is to be masked, a generator of another device.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the mask ratio must be in [0, 1), got {ratio}; at 1 nothing would be visible")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"units are drawn on the CPU, the generator is on {generator.device}; use torch.Generator()")
    count = math.prod(units)
    if count < 2 and ratio > 0:
        raise ValueError(
            f"a patch of {count} unit(s) {tuple(units)} has nothing to predict from or nothing to predict; "
            "use a larger patch or a network with a smaller total stride"
        )
    visible = min(max(1, round(count * (1 - ratio))), count if ratio == 0 else count - 1)
    order = torch.rand(batch, count, generator=generator, dtype=torch.float64).argsort(1)
    drawn = torch.zeros(batch, count, dtype=torch.bool).scatter_(1, order[:, :visible], True)
    return drawn.view(batch, *units)


def mask_at(units: Tensor, grid: Sequence[int]) -> Tensor:
    """The mask of units on a finer grid: every unit repeated over its box of positions.

    Args:
        units: (B, *units) of any dtype.
        grid: positions per axis, a multiple of the units.

    Returns:
        (B, *grid), dtype and device of ``units``.

    Raises:
        ValueError: a grid of another number of axes, or one that is not a multiple.
    """
    coarse = units.shape[1:]
    if len(grid) != len(coarse) or any(size % n for size, n in zip(grid, coarse, strict=True)):
        raise ValueError(
            f"units {tuple(coarse)} do not fit a grid of {tuple(grid)}: every axis must be a multiple; "
            "draw units on the coarsest grid of the network"
        )
    for axis, (size, n) in enumerate(zip(grid, coarse, strict=True), start=1):
        units = units.repeat_interleave(size // n, dim=axis)
    return units


class Visible:
    """The masks of one call at every scale, made once each.

    Args:
        units: (B, *units) bool, True for visible units.
    """

    def __init__(self, units: Tensor):
        self.units = units
        self._made: dict[tuple[int, ...], Tensor] = {}

    def at(self, grid: Sequence[int]) -> Tensor:
        """(B, *grid); see :func:`mask_at`."""
        key = tuple(grid)
        if key not in self._made:
            self._made[key] = mask_at(self.units, key)
        return self._made[key]

    def keep(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) with 0 at masked positions."""
        return torch.where(self.at(x.shape[2:]).unsqueeze(1), x, 0)

    def tokens(self, grid: Sequence[int]) -> Tensor:
        """(B, L) for the tokens of a (D, H, W) grid; for an image D is 1."""
        return self.at(grid[len(grid) - (self.units.dim() - 1) :]).flatten(1)


class Masked(NamedTuple):
    """Features of a masked image and where they are visible, finest scale first.

    Attributes:
        features: (B, C, *spatial) each, 0 at masked positions.
        visible: (B, *spatial) bool each.
    """

    features: list[Tensor]
    visible: list[Tensor]


class MaskedEncoder(nn.Module):
    """The encoder of a network, which sees nothing of what is masked.

    Weights are those of ``encoder`` itself, under ``encoder.`` in the state dict as in the network they come from.
    A call does not touch the encoder: it runs a copy of the module tree that shares all parameters and buffers and
    carries the masks of this call. Calls may therefore overlap, fail, or be computed again in the backward pass
    (``torch.utils.checkpoint``) with their own masks.

    Args:
        encoder: ``encoder(x)`` gives a list of (B, C, *spatial), e.g. ``network.encoder``.
        total_stride: of its coarsest grid, per axis, e.g. ``network.total_stride``.

    Raises:
        ValueError: the encoder has a module that has no rule under a mask, such as BatchNorm; the text names it.
    """

    def __init__(self, encoder: nn.Module, total_stride: Sequence[int]):
        super().__init__()
        for name, module in _parts(encoder):
            _rule(module, name)
        self.encoder = encoder
        self.total_stride = tuple(total_stride)

    def forward(self, x: Tensor, units: Tensor) -> Masked:
        """Features of the visible part of an image.

        Args:
            x: (B, C, *spatial), floating point. What masked voxels hold, NaN included, is never read.
            units: (B, *units) bool, True for visible units; on any device, best on the CPU, where looking at them
                does not wait for a GPU. Numbers may differ between samples. If all are visible, this is the encoder.

        Raises:
            ValueError: units that do not fit the image, or a sample without a visible unit.
        """
        expected = (x.shape[0], *unit_grid(x.shape[2:], self.total_stride))
        if tuple(units.shape) != expected or units.dtype != torch.bool:
            raise ValueError(f"units must be {expected} bool for this image, got {tuple(units.shape)} {units.dtype}")
        if not bool(units.flatten(1).any(1).all()):
            raise ValueError("a sample has no visible unit; lower the mask ratio or enlarge the patch")
        visible = Visible(units.to(x.device, non_blocking=True))
        if bool(units.all()):
            features = self.encoder(x)
        else:
            features = [visible.keep(f) for f in masked_copy(self.encoder, visible)(visible.keep(x))]
        return Masked(features, [visible.at(f.shape[2:]) for f in features])


def fill_masked(fill: nn.Module, feature: Tensor, visible: Tensor) -> Tensor:
    """A feature with its masked positions filled by one of :data:`medmamba_pretrain.fill.FILLS`.

    Args:
        fill: ``fill(tokens, visible, grid)``.
        feature: (B, C, *spatial), two or three axes.
        visible: (B, *spatial) bool.

    Returns:
        like ``feature``; visible positions are the same bits.
    """
    spatial = feature.shape[2:]
    grid = (1,) * (3 - len(spatial)) + tuple(spatial)
    tokens = fill(feature.flatten(2).mT, visible.flatten(1), grid)
    return tokens.mT.unflatten(2, spatial)


def masked_copy(module: nn.Module, visible: Visible) -> nn.Module:
    """A copy of a module tree with the same parameters and buffers, in which every module follows its rule.

    Args:
        module: the tree; hooks on its modules run in the copy too.
        visible: masks of the call that the copy is for.
    """
    # As torch's DataParallel makes its replicas: attributes are shared, the containers that differ are new.
    replica = module.__new__(type(module))
    replica.__dict__ = dict(module.__dict__)
    rule = _rule(module, type(module).__name__)
    if rule is not None:
        replica.__dict__["forward"] = rule(module, visible)
    else:
        children = module._modules.items()
        replica.__dict__["_modules"] = {
            name: None if child is None else masked_copy(child, visible) for name, child in children
        }
    return replica


def _rule(module: nn.Module, name: str) -> Rule | None:
    """How a module runs under a mask; None if its children say so, or if nothing crosses the border of a unit in it.

    Raises:
        ValueError: it mixes positions in a way that has no rule, or nobody has said whether it does.
    """
    if takes_mask(module):
        return _with_token_mask
    if isinstance(module, _CONVOLUTIONS):
        return None if math.prod(module.kernel_size) == 1 else _between_zeros
    if isinstance(module, _INSTANCE_NORMS) and not module.track_running_stats:
        return partial(_with_visible_statistics, groups=None)
    if isinstance(module, nn.GroupNorm):
        return partial(_with_visible_statistics, groups=module.num_groups)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return None
    tiles = isinstance(module, _POOLS) and _tiles(module)
    if tiles or isinstance(module, _PER_POSITION) or _leaves_it_to_its_children(module):
        return None
    raise ValueError(f"{name} ({type(module).__name__}) cannot run under a mask: {_reason(module)}")


def _leaves_it_to_its_children(module: nn.Module) -> bool:
    # With weights of its own it does something itself, and FeedForward convolves with those of its children.
    has_weights = any(parameter is not None for parameter in module._parameters.values())
    convolves = isinstance(module, FeedForward) and len(module.convs) > 0
    return len(module._modules) > 0 and not has_weights and not convolves


def takes_mask(module: nn.Module) -> bool:
    """Whether a module is a mixer ``(u, grid, *, mask=None)`` as in :mod:`medmamba.mixers`."""
    return "mask" in _arguments(type(module).forward)


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _reason(module: nn.Module) -> str:
    if isinstance(module, _BATCH_NORMS):
        return "its statistics mix samples and, in eval mode, come from unmasked images; use an instance norm"
    if isinstance(module, _INSTANCE_NORMS):
        return "its running statistics would mix masked and unmasked images; set track_running_stats=False"
    if isinstance(module, _POOLS):
        return "its windows overlap or are padded, so they straddle units; use kernel_size = stride without padding"
    return (
        "it is not known whether it mixes positions; if not, add it to _PER_POSITION in medmamba_pretrain/masking.py, "
        "else give it a rule there"
    )


def _parts(module: nn.Module, prefix: str = "encoder") -> Iterator[tuple[str, nn.Module]]:
    """The modules that need a rule, with their paths; a mixer that takes the mask answers for all inside it."""
    yield prefix, module
    if not takes_mask(module):
        for name, child in module.named_children():
            yield from _parts(child, f"{prefix}.{name}")


def _tiles(pool: Any) -> bool:
    """Whether the windows of a pooling lie side by side. Its sizes are numbers, or have one number per axis."""
    sizes = (pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1))
    kernel, stride, padding, dilation = map(torch.as_tensor, sizes)
    return bool((kernel == stride).all() and (padding == 0).all() and (dilation == 1).all()) and not pool.ceil_mode


def _with_token_mask(module: nn.Module, visible: Visible) -> Forward:
    def forward(u: Tensor, grid: Sequence[int]) -> Tensor:
        return module.forward(u, grid, mask=visible.tokens(grid))

    return forward


def _between_zeros(module: nn.Module, visible: Visible) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return visible.keep(module.forward(visible.keep(x)))

    return forward


def _with_visible_statistics(module: Any, visible: Visible, *, groups: int | None) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return masked_group_norm(
            x, visible.at(x.shape[2:]), groups or x.shape[1], weight=module.weight, bias=module.bias, eps=module.eps
        )

    return forward


def masked_group_norm(
    x: Tensor, visible: Tensor, groups: int, *, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm whose mean and (biased) variance are those of each sample's visible positions.

    With as many groups as channels this is the instance norm. A single visible position becomes the bias.

    Args:
        x: (B, C, *spatial), any float dtype; computed in float32 or, for float64, in float64.
        visible: (B, *spatial) bool, at least one position per sample.
        groups: G, divides C.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: added to the variance.

    Returns:
        like ``x``; 0 at masked positions.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1))
    mask = visible.unsqueeze(1).unsqueeze(1)
    axes = tuple(range(2, wide.dim()))
    count = mask.sum(axes, keepdim=True) * wide.shape[2]
    mean = torch.where(mask, wide, 0).sum(axes, keepdim=True) / count
    centred = torch.where(mask, wide - mean, 0)
    variance = centred.square().sum(axes, keepdim=True) / count
    y = (centred * torch.rsqrt(variance + eps)).flatten(1, 2)
    shape = (1, -1, *[1] * (x.dim() - 2))
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = torch.where(visible.unsqueeze(1), y + bias.view(shape), 0)
    return y.to(x.dtype)
