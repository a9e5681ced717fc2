"""FER-YOLO-Mamba: half of the channels are scanned."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="feryolo3d",
    title="FERYOLO3D",
    source=Source(
        title="FER-YOLO-Mamba: Facial Expression Detection and Classification Based on Selective State Space",
        authors="Hui Ma et al.",
        year=2024,
        link="https://arxiv.org/abs/2405.01828",
        code="SwjtuMa/FER-YOLO-Mamba",
    ),
    summary="half of the channels through S6, the other half through squeeze and excitation",
    theirs=(
        "channels in two halves, one scanned, one weighted by attention over channels; both joined by a linear map",
    ),
    changes=(
        "six rasters instead of four",
        "one projection and one depthwise convolution in front of both halves, no gate",
        "no expansion, so the scan reads half of the block's width",
    ),
    block={"assign": "half", "expand": 1.0},
)
