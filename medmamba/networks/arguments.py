"""Arguments that the builders of the networks share: defaults per stage, and checks that name what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from medmamba.layers import Place
from medmamba.mixers import get_core
from medmamba.mixers.block import mixer_builder
from medmamba.presets import get_mixer

from .unet import total_strides

#: nnU-Net's shape, and the published one.
GEOMETRIES = ("native", "faithful")
#: Routes of VMamba's blocks, by number of axes.
VSS_ROUTES = {2: "raster4", 3: "raster6"}
#: nnU-Net's caps of the width, by number of axes.
MAX_FEATURES = {2: 512, 3: 320}


def check_geometry(geometry: str) -> None:
    """ValueError for a geometry that does not exist; the text lists those that do."""
    if geometry not in GEOMETRIES:
        raise ValueError(f"unknown geometry {geometry!r}; known: {', '.join(GEOMETRIES)}")


#: A mixer as networks take it: its name, or a mapping with ``name`` and options that replace those of its preset.
Mixer = str | Mapping[str, Any] | None


def blocks_of(own: Callable[..., nn.Module], mixer: Mixer, ssm_mode: str) -> Callable[..., nn.Module]:
    """What builds the blocks of a network, ``build(width, place=..., drop_path=...)``: its own, or those of a mixer.

    Args:
        own: ``own(width, kernel_size=..., drop_path=...)``.
        mixer: name in :data:`medmamba.presets.MIXERS` or of a third party, a mapping with ``name`` and options
            (:class:`medmamba.mixers.block.BlockOptions`), or None for the network's own blocks.
        ssm_mode: "scan", or the control in the place of the mixer's core; ``own`` has taken it already.

    Raises:
        KeyError: an unknown mixer or core.
        ValueError: an option that no block has, or a mapping without a name.
    """
    return partial(_at_kernel_of, own) if mixer is None else mixer_blocks(mixer, ssm_mode)


def mixer_blocks(mixer: str | Mapping[str, Any], ssm_mode: str) -> Callable[..., nn.Module]:
    """``build(width, place=..., drop_path=...)`` of a mixer; arguments and errors as :func:`blocks_of`."""
    return mixer_builder(block_options(mixer), get_core, ssm_mode)


def block_options(mixer: str | Mapping[str, Any]) -> dict[str, Any]:
    """Options of the blocks of a mixer: those of its preset, and what the mapping changes.

    Raises:
        KeyError: an unknown mixer.
        ValueError: a mapping without a name.
    """
    if isinstance(mixer, str):
        return dict(get_mixer(mixer).block)
    options = dict(mixer)
    if "name" not in options:
        raise ValueError(f"a mixer with options needs a name, got {sorted(options)}; e.g. {{'name': 'vim3d'}}")
    return {**get_mixer(options.pop("name")).block, **options}


def _at_kernel_of(own: Callable[..., nn.Module], width: int, *, place: Place, drop_path: float) -> nn.Module:
    return own(width, kernel_size=place.kernel_size, drop_path=drop_path)


def kernels_of_stages(
    kernel_sizes: Sequence[Sequence[int]] | None, strides: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """One kernel size per stage, 3 along every axis by default; ValueError for another number of stages."""
    kernels = [tuple(k) for k in kernel_sizes or [[3] * len(strides[0])] * len(strides)]
    require_length("kernel_sizes", kernels, len(strides))
    return kernels


def resolve_first_scan(strides: Sequence[Sequence[int]], chosen: int | None) -> int:
    """First stage that scans: at stride 4 if isotropic, at the latest the deepest; or the one chosen, if possible."""
    if chosen is not None:
        if not 0 < chosen < len(strides):
            raise ValueError(
                f"first_scan_stage must lie in 1..{len(strides) - 1} for {len(strides)} stages, got {chosen}"
            )
        return chosen
    totals = total_strides(strides)
    deep = [i for i, total in enumerate(totals) if math.prod(total) >= 4 ** len(total)]
    return deep[0] if deep else len(strides) - 1


def widths_of_stages(given: Sequence[int] | None, base: int, stages: int, cap: int | None) -> list[int]:
    """``given``, or ``base`` doubled per stage up to ``cap``; ValueError for another number than ``stages``."""
    widths = list(given) if given is not None else [base * 2**i for i in range(stages)]
    if given is None and cap is not None:
        widths = [min(width, cap) for width in widths]
    require_length("features_per_stage", widths, stages)
    return widths


def per_stage(name: str, value: int | Sequence[int], stages: int) -> list[int]:
    """One positive number per stage, from a number for all or a list; ValueError if it does not fit."""
    values = [value] * stages if isinstance(value, int) else list(value)
    require_length(name, values, stages)
    if any(v < 1 for v in values):
        raise ValueError(f"{name} must be at least 1 everywhere, got {values}")
    return values


def repeat_last(name: str, value: int | Sequence[int], stages: int) -> list[int]:
    """One positive number per stage from a list that is read from the finest stage on, or from a number for all.

    Deeper stages than the list has entries keep its last one; a network with fewer stages takes the first ones.

    Raises:
        ValueError: no number at all, or one below 1.
    """
    values = [value] if isinstance(value, int) else list(value)
    if not values or any(v < 1 for v in values):
        raise ValueError(f"{name} must be a number, or a list of numbers, of at least 1, got {value}")
    return (values + values[-1:] * stages)[:stages]


def require_length(name: str, values: Sequence[object], expected: int) -> None:
    """ValueError unless a list has one entry per stage."""
    if len(values) != expected:
        raise ValueError(f"{name} must have {expected} entries for these strides, got {len(values)}: {list(values)}")


def initialise_linear(module: nn.Module) -> None:
    """Published initialisation: Linear weights truncated-normal with std 0.02, everything else as torch does it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
