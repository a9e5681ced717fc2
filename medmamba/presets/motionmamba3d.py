"""Motion Mamba: more scans at coarser stages."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="motionmamba3d",
    title="MotionMamba3D",
    source=Source(
        title="Motion Mamba: Efficient and Long Sequence Motion Generation",
        authors="Zeyu Zhang et al.",
        year=2024,
        link="https://arxiv.org/abs/2403.07487",
        code="steve-zeyu-zhang/MotionMamba",
    ),
    summary="two, four and six routes at coarser and coarser stages",
    theirs=("the number of scans depends on the level of the U-Net",),
    changes=(
        "two, four and six are our numbers, few where tokens are many; routes instead of modules side by side",
        "no scan over the channels: their order means nothing",
        "the model's code is not published, so nothing but the idea is theirs",
    ),
    block={"gate": "silu", "stages": [{"routes": "raster2"}, {"routes": "raster4"}, {"routes": "raster6"}]},
)
