"""Mamba-YOLO: local part in front, gated convolution behind."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="mambayolo3d",
    title="MambaYOLO3D",
    source=Source(
        title="Mamba YOLO: A Simple Baseline for Object Detection with State Space Model",
        authors="Zeyu Wang et al.",
        year=2024,
        link="https://arxiv.org/abs/2406.05835",
        code="HZAI-ZJNU/Mamba-YOLO",
    ),
    summary="a local block in front of the norm, S6 along six rasters, a gated convolution instead of the MLP",
    theirs=(
        "LSBlock (convolution and two linear maps with a residual) in front, RGBlock (ConvGLU) behind",
        "the residual of the mixing leaves the local block out, as in the code",
    ),
    changes=(
        "LayerNorm for BatchNorm, SiLU for GELU around the scan",
        "six rasters instead of four",
        "the first values of Mamba for A (the code has -1 for all)",
    ),
    block={"before": "local_spatial", "gate": "silu", "channel_mix": "conv_glu"},
)
