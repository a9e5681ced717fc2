"""What the project says about a network: paper, departures, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: nnU-Net's usual plan of an isotropic volume, for counts and times: patch 128 cubed, six stages.
USUAL_PATCH = (128, 128, 128)
USUAL_STRIDES = ((1, 1, 1), *((2, 2, 2),) * 5)


@dataclass(frozen=True)
class Paper:
    """Where an architecture comes from."""

    title: str
    authors: str
    year: int
    venue: str
    link: str
    dimensions: int


@dataclass(frozen=True)
class NetworkSpec:
    """One entry of the registry.

    Attributes:
        name: registry name, also used for trainers and plans.
        build: import path of the builder, which goes into nnU-Net's plans as ``network_class_name``.
        paper: the published original.
        summary: one line for tables.
        departures: what we changed against the paper, one sentence each; never empty.
        defaults: keyword arguments that the plans spell out so that a checkpoint stays readable when a default changes.
        presets: named sets of keyword arguments, on top of ``defaults``.
        adamw: what the paper says about AdamW: ``initial_lr``, ``weight_decay``, ``eps``; empty: nothing.
        has_scans: the builder takes ``ssm_mode``, ``mixer``, ``routes``, ``d_state`` and ``dt_init``. Without scans
            there is nothing that a control or a mixer could replace, and asking for one is an error.
        block_arguments: arguments that describe the network's own blocks, which a mixer replaces.
        published_strides: stride of every stage of the published network, which the faithful geometry keeps. A second
            entry of 4 is a patch embedding, which takes two downsamplings of a plan together.
    """

    name: str
    build: str
    paper: Paper
    summary: str
    departures: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adamw: Mapping[str, float] = field(default_factory=dict)
    has_scans: bool = True
    block_arguments: tuple[str, ...] = ("d_state", "expand", "routes")
    published_strides: tuple[int, ...] = (1, 4, 2, 2, 2)
