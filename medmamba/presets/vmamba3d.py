"""VMamba's block in its second version, one state and no gate."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="vmamba3d",
    title="VMamba3D",
    source=Source(
        title="VMamba: Visual State Space Model",
        authors="Yue Liu et al.",
        year=2024,
        link="https://arxiv.org/abs/2401.10166",
        code="MzeroMiko/VMamba",
    ),
    summary="S6 with one state along six rasters, their sum, then an MLP",
    theirs=(
        "expansion to twice the width, depthwise convolution, SiLU, a scan with weights of its own per route, "
        "their sum, LayerNorm, an MLP",
        "one state per channel and no gate, as in the released second version",
    ),
    changes=("six rasters instead of four: every axis is fastest once, to and fro",),
    block={"d_state": 1, "channel_mix": "mlp"},
)
