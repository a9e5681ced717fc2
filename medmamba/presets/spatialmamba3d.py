"""Spatial-Mamba: the states of one scan, mixed with those of their neighbours."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="spatialmamba3d",
    title="SpatialMamba3D",
    source=Source(
        title="Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion",
        authors="Chaodong Xiao et al.",
        year=2024,
        link="https://arxiv.org/abs/2410.15091",
        code="EdwardChasel/Spatial-Mamba",
    ),
    summary="one raster; the states are mixed by dilated convolutions before they are read out",
    theirs=(
        "one forward raster with one state per channel; depthwise convolutions of dilation 1, 3 and 5 over the "
        "states; then the read-out",
        "position convolutions in front of mixing and MLP, SiLU gate, LayerNorm",
    ),
    changes=(
        "kernels of three axes, 1 along thick slices",
        "the fusion starts as a mean: with ones, as published, 81 taps would multiply the states by 81",
        "dilations in the plan's spacing, smaller along coarser axes",
    ),
    avoided=("the merged kernel of the evaluation is built once and never again: stale after further training",),
    block={
        "core": "spatial",
        "routes": ["dhw"],
        "d_state": 1,
        "gate": "silu",
        "position": "conv",
        "position_twice": True,
        "channel_mix": "mlp",
    },
)
