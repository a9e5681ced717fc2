"""HRVMamba: kernels of several sizes in front of the scan."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="hrvmamba3d",
    title="HRVMamba3D",
    source=Source(
        title="HRVMamba: High-Resolution Visual State Space Model for Dense Prediction",
        authors="Hao Zhang et al.",
        year=2024,
        link="https://arxiv.org/abs/2410.03174",
        code="zhanghao5201/HRVMamba",
    ),
    summary="depthwise kernels of 3, 5, 7 and 9 on a quarter of the channels each, then S6 with one state and an MLP",
    theirs=(
        "LayerNorm, four kernels on four groups of channels, shuffle, GELU, all as a residual in front",
        "S6 with one state along every route, an MLP",
    ),
    changes=(
        "a depthwise convolution for the deformable one, which exists for CUDA and two dimensions only",
        "7 and 9 are three convolutions of one axis each: dense they would have 343 and 729 weights per channel",
        "six rasters instead of four",
        "the parallel resolutions of HRNet are left to the decoder of the U-Net",
    ),
    block={"d_state": 1, "position": "multi_kernel", "channel_mix": "mlp"},
)
