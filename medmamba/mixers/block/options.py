"""The choices that make a block, as JSON: checked, with those of single stages, and how a network uses them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import nn

from medmamba.layers import Place
from medmamba.mixers.routed import PARAMETERS
from medmamba_kernels import Route, resolve_routes

from .assign import ASSIGNMENTS
from .channel_mix import CHANNEL_MIXES
from .grids import GRIDS
from .local import LOCALS
from .merges import MERGES
from .token_mixer import GATES, MODULATIONS

#: Route sets whose routes depend on the number of axes of the image.
BY_AXES: dict[str, dict[int, tuple[str, ...] | str]] = {
    "line": {2: ("dhw:reset=line", "dwh:reset=line", "dhw:reset=line:reverse", "dwh:reset=line:reverse"), 3: "line6"},
    "raster": {2: "raster4", 3: "raster6"},
}
#: The raster, and the raster of the interleaved sub-grids, with the steps of the place.
STRIDED = "strided"
RESIDUALS = ("add", "convex", "scaled")
POSITIONS = ("conv", "multi_kernel")
#: Choices with names, and whether the choice may be left out (None).
_NAMES: dict[str, tuple[Sequence[str], bool]] = {
    "grid": (tuple(GRIDS), False),
    "assign": (tuple(ASSIGNMENTS), False),
    "merge": (tuple(MERGES), False),
    "parameters": (PARAMETERS, False),
    "gate": (tuple(GATES), True),
    "modulation": (MODULATIONS, True),
    "channel_mix": (tuple(CHANNEL_MIXES), True),
    "local": (tuple(LOCALS), True),
    "before": (tuple(LOCALS), True),
    "position": (POSITIONS, True),
    "residual": (RESIDUALS, False),
}


@dataclass(frozen=True)
class BlockOptions:
    """A token mixing block. All values are JSON.

    Attributes:
        core: name in :data:`medmamba.mixers.CORES`, or of a third party; None leaves the mixing of tokens out.
        core_options: further arguments of the core.
        d_state: N of the core.
        grid: "full"; "pool": one route reads the volume, the others a smaller one; "phase": interleaved sub-grids;
            "profile": means along the axes.
        routes: a route set, a list of routes, or "raster" and "line" (every axis fastest once, to and fro; "line" with
            a reset at every line), "strided" (the raster, and that of the sub-grids one after the other).
        keep_thick: False drops routes whose fastest axis is one that the plan's convolutions do not look along here
            (thick slices), unless none were left.
        assign: "all" channels to every route; "group": channels in groups with routes of their own; "half": one half
            scanned; "streams": interleaved channel groups.
        groups: of "group" (default: the number of routes) and "streams".
        parameters: a set of weights per "route", per "direction", or one "shared" by all.
        merge: of the routes: "sum", "mean", "norm_sum", "concat", "gated", "cascade".
        expand: inner width over width; None: no projections.
        gate: "silu", "linear" or None.
        norm: LayerNorm behind the mixing.
        modulation: "se", "affinity" or None.
        local: convolution between in-projection and mixing: "dwconv", "in_plane" (not along the slowest axis),
            "local_spatial", "multi_kernel" or None.
        before: the same in front of the block's norm.
        beside: a convolution side by side with all of this.
        position: "conv": x + depthwise convolution of x in front; "multi_kernel"; or None.
        position_twice: also in front of the channel mixing.
        channel_mix: "mlp", "conv_ffn", "conv_glu", "inverted_residual" or None.
        channel_ratio: its hidden channels over the width.
        one_residual: mixing, norm and channel mixing inside one residual (MedNeXt) instead of two.
        residual: "add", "convex" or "scaled".
        spacing: mm (or any unit) of the image's voxels per axis, for cores that know distances; None: all equal.
        stages: changes for the stages with blocks, finest first; the last entry holds for all deeper ones.
        deepest: changes for the coarsest stage of the network, on top.

    Raises:
        ValueError: a name that no choice has; the text lists those that exist.
    """

    core: str | None = "scan"
    core_options: Mapping[str, Any] = field(default_factory=dict)
    d_state: int = 16
    grid: str = "full"
    routes: str | Sequence[str] = "raster"
    keep_thick: bool = True
    assign: str = "all"
    groups: int | None = None
    parameters: str = "route"
    merge: str = "sum"
    expand: float | None = 2.0
    gate: str | None = None
    norm: bool = True
    modulation: str | None = None
    local: str | None = "dwconv"
    before: str | None = None
    beside: bool = False
    position: str | None = None
    position_twice: bool = False
    channel_mix: str | None = None
    channel_ratio: float = 4.0
    one_residual: bool = False
    residual: str = "add"
    spacing: Sequence[float] | None = None
    stages: Sequence[Mapping[str, Any]] = ()
    deepest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (known, may_be_none) in _NAMES.items():
            value = getattr(self, name)
            if value not in known and not (value is None and may_be_none):
                options = [*map(repr, known), *(["null"] if may_be_none else [])]
                raise ValueError(f"a block has no {name} {value!r}; known: {', '.join(options)}")
        if self.core is None and self.channel_mix is None:
            raise ValueError("a block without core and channel_mix does nothing; give it one of them")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> BlockOptions:
        """Options from JSON.

        Raises:
            ValueError: an option that no block has, here or among the changes of a stage; the text lists those known.
        """
        known = {f.name for f in fields(cls)}
        for changes in (options, *options.get("stages", ()), options.get("deepest", {})):
            unknown = sorted(set(changes) - known)
            if unknown:
                raise ValueError(f"a block has no option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**options)

    def at(self, place: Place) -> BlockOptions:
        """The choices at one place: those of its stage, and of the coarsest stage, on top."""
        of_stage = self.stages[min(place.depth, len(self.stages) - 1)] if self.stages else {}
        changes = {**of_stage, **(self.deepest if place.is_deepest else {})}
        return replace(self, **{**changes, "stages": (), "deepest": {}})

    def routes_at(self, place: Place) -> list[Route]:
        """The routes at one place.

        Raises:
            ValueError: no such route or set.
        """
        names: str | Sequence[str] = self.routes
        if names == STRIDED:
            step = (1,) * (3 - place.ndim) + place.pool
            names = ("dhw", f"dhw:step={'x'.join(map(str, step))}")
        elif isinstance(names, str) and names in BY_AXES:
            names = BY_AXES[names][place.ndim]
        routes = list(resolve_routes(names))
        if self.keep_thick:
            return routes
        sizes = dict(zip("dhw"[3 - place.ndim :], place.kernel_size, strict=True))
        thin = [route for route in routes if sizes.get(route.axes[-1], 1) > 1]
        return thin or routes

    def core_at(self, place: Place, core: type[nn.Module], is_own: bool) -> Callable[..., nn.Module]:
        """Builds the core here: with its options, and with the spacing of its tokens if it asks for that.

        Args:
            place: where.
            core: the class.
            is_own: it is the core of the options, not a control in its place.
        """
        given = dict(self.core_options) if is_own else {}
        asks = inspect.signature(core).parameters
        if "parameters" in asks and is_own and self.parameters != "route":
            given["parameters"] = self.parameters
        if "spacing" in asks and self.spacing is not None:
            mm = [s * scale for s, scale in zip(self.spacing, place.scale, strict=True)]
            given["spacing"] = [s / min(mm) for s in mm]
        return partial(core, d_state=self.d_state, **given)


def mixer_builder(
    options: Mapping[str, Any], core_class: Callable[[str], type[nn.Module]], ssm_mode: str = "scan"
) -> Callable[..., nn.Module]:
    """``build(width, place=..., drop_path=...)`` of a mixer, as networks build their blocks.

    Args:
        options: of :class:`BlockOptions`, as JSON.
        core_class: a core by its name.
        ssm_mode: "scan" keeps the cores of the mixer; a control replaces each of them.

    Raises:
        ValueError: an option or a name that does not exist.
        KeyError: an unknown core.
    """
    from .block import mixer_block

    chosen = BlockOptions.from_mapping(options)

    def build(width: int, *, place: Place, drop_path: float = 0.0) -> nn.Module:
        here = chosen.at(place)
        is_own = ssm_mode == "scan"
        core = None
        if here.core is not None:
            core = here.core_at(place, core_class(here.core if is_own else ssm_mode), is_own)
        return mixer_block(width, options=here, place=place, core=core, drop_path=drop_path)

    return build
