"""Multi-Scale VMamba: one route at full resolution, the others on a smaller grid."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="msvmamba3d",
    title="MSVMamba3D",
    source=Source(
        title="Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model",
        authors="Yuheng Shi et al.",
        year=2024,
        link="https://arxiv.org/abs/2405.14174",
        code="YuHengsss/MSVMamba",
    ),
    summary=(
        "S6 with one state, one route at full resolution and five on a pooled grid, squeeze and excitation, ConvFFN"
    ),
    theirs=(
        "one route reads the map, the others one that a strided depthwise convolution of size 7 makes; a "
        "LayerNorm each, the smaller one enlarged and added",
        "squeeze and excitation, SiLU gate, ConvFFN of twice the width",
        "the routes of the smaller grid share their weights",
    ),
    changes=(
        "an axis is reduced as nnU-Net reduces it towards the next stage, not always by 2: thick slices stay",
        "five routes on the smaller grid instead of three, every axis fastest; trilinear interpolation",
        "the smaller map is made from the convolved features, not from the projection",
    ),
    avoided=(
        "routes joined into one sequence, through which the state of one leaks into the next",
        "the second branch of the code reads one part twice and another never (two of its four settings)",
    ),
    block={
        "grid": "pool",
        "d_state": 1,
        "parameters": "shared",
        "gate": "silu",
        "norm": False,
        "modulation": "se",
        "channel_mix": "conv_ffn",
        "channel_ratio": 2.0,
    },
)
