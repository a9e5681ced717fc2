"""Derive plans for one of our networks from a dataset's stock plans.

Only the architecture changes, and what the user asks to change. Spacing, normalisation and the data
identifiers stay, so that preprocessed data are shared with nnU-Net's own networks and results can be
compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from math import inf
from pydoc import locate
from typing import Any

from medmamba.networks import SCAN_ARGUMENTS, get_spec
from medmamba.nnunet.architecture import (
    ArchitectureError,
    architecture_block,
    check_patch,
    network_of,
    placed_mixer,
)
from medmamba.nnunet.distillation import Distillation
from medmamba.nnunet.errors import UserFacingError
from medmamba.nnunet.names import plans_name
from medmamba.nnunet.schedule import Schedule
from medmamba.presets import get_mixer

#: Budgets in GB of GPU memory, with the names of nnU-Net's ResEnc presets of the same budget.
PRESETS = {"M": 8.0, "L": 24.0, "XL": 40.0}

#: What plans for a budget are derived from, in place of the name of stock plans.
BUDGET = "GPU budget"

#: How the step sizes of the scans start: in Mamba's range, or in one per route (``route_dt_range``).
DT_INITS = ("default", "route")


#: Options that become part of the name of the plans, unless they are the usual ones.
_NAMED = {"geometry": "native", "mixer": None, "ssm_mode": "scan", "routes": None}

#: Arguments of every network that are not the user's to choose.
_PLANNED = frozenset({"input_channels", "num_classes", "strides", "kernel_sizes", "deep_supervision", "dt_init"})


class PlanError(UserFacingError, ValueError):
    """Plans cannot be derived as asked; the text says why and what to do."""


@dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
        network: name in ``medmamba.networks.NETWORKS``.
        variant: name of one of the network's argument sets (``NetworkSpec.presets``), or None.
        options: arguments of the network that win over the variant (``geometry``, ``ssm_mode``, ``routes``, ...).
        preset: name in ``PRESETS``: patch and batch are planned for this GPU, or None.
        gpu_gb: the same for a GPU of this many GB.
        batch_size: in place of the planned one, or None.
        patch_size: the same, for the configurations with as many axes, or None.
        schedule: how long and with what to train.
        configurations: those to plan, or None for all; what they inherit from and follow comes along.
        name: plans identifier, or None for the house style.
        dt_init: one of ``DT_INITS``.
        distillation: which teacher the network learns from, or None.
    """

    network: str
    variant: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    gpu_gb: float | None = None
    batch_size: int | None = None
    patch_size: Sequence[int] | None = None
    schedule: Schedule = field(default_factory=Schedule)
    configurations: Sequence[str] | None = None
    name: str | None = None
    dt_init: str = "default"
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        try:
            spec = get_spec(self.network)
        except KeyError as error:
            raise PlanError(error.args[0]) from error
        variants = spec.presets
        if self.variant is not None and self.variant not in variants:
            known = ", ".join(variants) or "none"
            raise PlanError(f"network {self.network} has no variant {self.variant!r}; known: {known}")
        self._check_budget(variants)
        if self.dt_init not in DT_INITS:
            raise PlanError(f"unknown dt_init {self.dt_init!r}; known: {', '.join(DT_INITS)}")
        surplus = [name for name in SCAN_ARGUMENTS if name in self.options]
        surplus += ["dt_init"] if self.dt_init != "default" else []
        if surplus and not spec.has_scans:
            raise PlanError(
                f"network {self.network} has no scans, so there is no {', '.join(surplus)} to choose; leave it out, or "
                "plan a network with scans"
            )
        self._check_mixer()
        if self.batch_size is not None and self.batch_size < 1:
            raise PlanError(f"batch size {self.batch_size} is not possible; use 1 or more (2 or more with few cases)")
        reserved = sorted(_PLANNED & self.options.keys())
        if reserved:
            raise PlanError(f"{', '.join(reserved)} cannot be set: nnU-Net or its plans decide")
        if self.name is None and not isinstance(self.options.get("routes", ""), str):
            raise PlanError("a list of routes is an experiment of its own; name its plans with --plans-name")
        if "__" in self.plans_name or "/" in self.plans_name:
            raise PlanError(
                f"plans name {self.plans_name!r} contains '__' or '/', which nnU-Net uses as separators; rename"
            )

    def _check_mixer(self) -> None:
        mixer = self.options.get("mixer")
        if mixer is None:
            return
        own = [name for name in get_spec(self.network).block_arguments if name in self.options]
        if own:
            raise PlanError(
                f"{', '.join(own)} say something of the blocks that the mixer replaces; leave it out, or change the "
                "mixer's own options (--mixer-set)"
            )
        if self.name is None and not isinstance(mixer, str):
            raise PlanError("a mixer with options is an experiment of its own; name its plans with --plans-name")
        try:
            get_mixer(mixer if isinstance(mixer, str) else mixer.get("name", ""))
        except KeyError as error:
            raise PlanError(error.args[0]) from error

    def _mixer_title(self) -> str | None:
        mixer = self.options.get("mixer")
        return get_mixer(mixer).title if isinstance(mixer, str) else None

    def _check_budget(self, variants: Mapping[str, Any]) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            hint = f"; {self.preset} is a variant: --variant {self.preset}" if self.preset in variants else ""
            raise PlanError(f"no preset {self.preset!r}; known: {', '.join(PRESETS)} (GPU memory){hint}")
        if self.preset is not None and self.gpu_gb is not None:
            raise PlanError(f"preset {self.preset} is a GPU of {PRESETS[self.preset]:g} GB; leave --gpu-gb out")
        if self.gpu_gb is not None and not 0 < self.gpu_gb < inf:
            raise PlanError(f"a GPU of {self.gpu_gb:g} GB is not possible; give its memory in GB, e.g. --gpu-gb 11")

    @property
    def budget_gb(self) -> float | None:
        """GPU memory to plan for, in GB, or None."""
        return self.gpu_gb if self.preset is None else PRESETS[self.preset]

    @property
    def plans_name(self) -> str:
        """The identifier: as asked, or the network with the choices that make it another experiment."""
        if self.name is not None:
            return self.name
        spelled: dict[str, Any] = {**self.options, "mixer": self._mixer_title()}
        chosen: list[Any] = [self.variant, *(spelled.get(name, default) for name, default in _NAMED.items())]
        if self.dt_init != "default":
            chosen.append(f"dt_{self.dt_init}")
        chosen.append(self._budget_name())
        if self.distillation is not None:
            chosen.append("distilled")
        return plans_name(self.network, *(name for name in chosen if name not in (None, *_NAMED.values())))

    def _budget_name(self) -> str | None:
        """``M`` or ``11G``; where a variant of the network is called like a preset, ``8G`` in place of M."""
        if self.preset is not None and not PRESETS.keys() & get_spec(self.network).presets.keys():
            return self.preset
        return None if self.budget_gb is None else f"{self.budget_gb:g}G"

    @property
    def network_options(self) -> dict[str, Any]:
        """Variant and options together."""
        variant = get_spec(self.network).presets[self.variant] if self.variant is not None else {}
        return {**variant, **self.options}


def derive_plans(stock: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """Our plans from stock ones; the stock plans are not changed.

    Every network that the result names has been built once, so arguments that a network refuses are refused
    here.

    Args:
        stock: a plans dictionary of nnU-Net (any planner whose networks have strides).
        request: what to plan.

    Returns:
        a plans dictionary of JSON values.

    Raises:
        PlanError: the request does not fit the plans or the network.
    """
    plans = deepcopy(dict(stock))
    plans["plans_name"] = request.plans_name
    plans["configurations"] = _selected(plans["configurations"], request.configurations)
    if request.patch_size is not None and not any(
        len(configuration.get("patch_size", ())) == len(request.patch_size)
        for configuration in plans["configurations"].values()
    ):
        raise PlanError(
            f"patch size {_size(request.patch_size)} has {len(request.patch_size)} axes; no configuration among "
            f"{', '.join(plans['configurations'])} has as many"
        )
    for name, configuration in plans["configurations"].items():
        try:
            _derive_configuration(configuration, request)
        except ArchitectureError as error:
            raise PlanError(f"configuration {name}: {error}") from error
    plans["medmamba"] = {
        "network": request.network,
        "variant": request.variant,
        "options": dict(request.options),
        "dt_init": request.dt_init,
        "gpu_gb": request.budget_gb,
        "schedule": request.schedule.to_dict(),
        "derived_from": stock["plans_name"],
        "version": version("medmamba"),
    }
    if request.distillation is not None:
        plans["medmamba"]["distillation"] = request.distillation.to_dict()
    return plans


def check_options(request: Request) -> None:
    """Refuse options that the network refuses, before there are plans: it is built for a small four-stage volume.

    Raises:
        PlanError: the network refuses its options.
    """
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    small = {"network_class_name": "none", "arch_kwargs": {"strides": strides}}
    _build_once(architecture_block(request.network, small, request.network_options))


def _selected(configurations: dict[str, Any], wanted: Sequence[str] | None) -> dict[str, Any]:
    """The wanted configurations, with those they inherit from and those of the previous stage, in the plans' order."""
    if wanted is None:
        return configurations
    unknown = [name for name in wanted if name not in configurations]
    if unknown:
        raise PlanError(f"the plans have no configuration {', '.join(unknown)}; known: {', '.join(configurations)}")
    needed = {name for start in wanted for name in _with_needed(configurations, start)}
    selected = {name: configuration for name, configuration in configurations.items() if name in needed}
    for configuration in selected.values():
        # After training, nnU-Net predicts for the next stage and fails if the plans do not have it.
        if not set(_names(configuration.get("next_stage"))) <= needed:
            del configuration["next_stage"]
    return selected


def _with_needed(configurations: Mapping[str, Any], name: str) -> Iterator[str]:
    yield name
    for key in ("inherits_from", "previous_stage"):
        if key in configurations[name]:
            yield from _with_needed(configurations, configurations[name][key])


def _names(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _derive_configuration(configuration: dict[str, Any], request: Request) -> None:
    """Change one configuration in place. One that only inherits (a cascade) gets its values from its parent."""
    if "batch_size" in configuration and request.batch_size is not None:
        configuration["batch_size"] = request.batch_size
    if request.patch_size is not None and len(configuration.get("patch_size", ())) == len(request.patch_size):
        configuration["patch_size"] = list(request.patch_size)
    if "architecture" not in configuration:
        return
    named = network_of(configuration["architecture"])
    if named is not None:
        raise PlanError(
            f"the plans to start from were made for the network {named}; start from nnU-Net's own (--from nnUNetPlans)"
        )
    options = {**request.network_options, **_dt_options(configuration, request)}
    if options.get("mixer") is not None:
        options["mixer"] = placed_mixer(options["mixer"], configuration)
    block = architecture_block(request.network, configuration["architecture"], options)
    if "patch_size" in configuration:
        check_patch(configuration["patch_size"], block["arch_kwargs"]["strides"])
    _build_once(block)
    configuration["architecture"] = block


def _dt_options(configuration: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """What the network derives its step sizes per route from: the patch and spacing of this configuration."""
    if request.dt_init == "default":
        return {}
    if not {"patch_size", "spacing"} <= set(configuration):
        raise PlanError("dt_init route needs a configuration with a patch size and spacing of its own")
    return {"dt_init": {"patch_size": configuration["patch_size"], "spacing": configuration["spacing"]}}


def _build_once(block: Mapping[str, Any]) -> None:
    """Build the network as nnU-Net will, on one channel and two classes; what it refuses is an error of the request."""
    build: Any = locate(block["network_class_name"])
    try:
        build(input_channels=1, num_classes=2, **block["arch_kwargs"], deep_supervision=True)
    except (ValueError, TypeError) as error:
        raise PlanError(str(error)) from error
    except KeyError as error:
        raise PlanError(str(error.args[0])) from error


def _size(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
