"""EfficientVMamba: the sub-grids of an atrous split, each scanned once, beside a convolution."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="effvmamba3d",
    title="EffVMamba3D",
    source=Source(
        title="EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
        authors="Xiaohuan Pei et al.",
        year=2024,
        link="https://arxiv.org/abs/2403.09977",
        code="TerryPei/EfficientVMamba",
    ),
    summary="interleaved sub-grids with a scan each, beside a convolution; inverted residuals at the deeper stages",
    theirs=(
        "every voxel is read by one scan: the sub-grids of the steps have weights and a route of their own",
        "scan and convolution side by side, through one squeeze and excitation, added; an MLP follows",
        "scans at the two finest stages with blocks, inverted residuals below",
    ),
    changes=(
        "steps per axis as nnU-Net reduces the axis: eight sub-grids where all axes are alike, four beside thick "
        "slices",
        "sub-grid i reads route i of the six rasters: eight of them have every axis to and fro, four have every axis "
        "(the original has two orders and no reverse)",
        "no gate, which the code has; LayerNorm for BatchNorm",
    ),
    avoided=(
        "for other steps than 2 only four sub-grids are scanned and the rest of the output is uninitialised memory",
        "sizes padded to a multiple of the step; here sub-grids have the sizes they have",
    ),
    block={
        "grid": "phase",
        "beside": True,
        "channel_mix": "mlp",
        "stages": [{}, {}, {"core": None, "channel_mix": "inverted_residual", "beside": False}],
    },
)
