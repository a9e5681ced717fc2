"""MambaMIL: the same tokens in their order and in strides."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="mambamil3d",
    title="MambaMIL3D",
    source=Source(
        title="MambaMIL: Enhancing Long Sequence Modeling with Sequence Reordering in Computational Pathology",
        authors="Shu Yang et al.",
        year=2024,
        link="https://arxiv.org/abs/2403.06800",
        code="isyangshu/MambaMIL",
    ),
    summary="S6 along the raster, and along the interleaved sub-grids one after the other",
    theirs=(
        "two scans with weights of their own over the same projection: natural order and strided order; their "
        "sum, the gate",
    ),
    changes=(
        "strides per axis of the volume, as nnU-Net reduces it, instead of 10 along a bag without geometry",
        "one depthwise convolution over the axes for the causal ones",
    ),
    avoided=("the path without fused kernels uses a variable that does not exist and overwrites one branch",),
    block={"routes": "strided", "gate": "silu", "norm": False},
)
