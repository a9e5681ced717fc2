"""GroupMamba: groups of channels with a route each."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="groupmamba3d",
    title="GroupMamba3D",
    source=Source(
        title="GroupMamba: Efficient Group-Based Visual State Space Model",
        authors="Abdelrahman Shaker et al.",
        year=2024,
        link="https://arxiv.org/abs/2407.13772",
        code="Amshaker/GroupMamba",
    ),
    summary="six groups of channels with a route each, S6 with one state, modulation by the input, ConvFFN",
    theirs=(
        "channels in groups, one direction each, no expansion, one state",
        "the joined result times the input of the block, a scalar, and the channel affinity of the input; "
        "LayerNorm; ConvFFN",
    ),
    changes=(
        "six groups for six rasters instead of four; where slices are thick, routes along them are dropped and "
        "groups with them",
        "one projection for all groups instead of a complete block per group, and no gate inside the groups",
        "a ConvFFN of four times the width at every stage, instead of eight times at the finer ones",
        "no distillation from a RegNet, which the published numbers include",
    ),
    avoided=("the gradient of a route on maps that are not square (height and width exchanged in the backward pass)",),
    block={
        "assign": "group",
        "expand": 1.0,
        "d_state": 1,
        "keep_thick": False,
        "modulation": "affinity",
        "norm": False,
        "channel_mix": "conv_ffn",
    },
)
