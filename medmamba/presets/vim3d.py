"""Vision Mamba: one raster, to and fro."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="vim3d",
    title="Vim3D",
    source=Source(
        title="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        authors="Lianghui Zhu et al.",
        year=2024,
        link="https://arxiv.org/abs/2401.09417",
        code="hustvl/Vim",
    ),
    summary="S6 along one raster in both directions, their mean, a gate, no MLP",
    theirs=(
        "one in-projection for both directions, a scan with weights of its own per direction, the mean of the "
        "two, the SiLU gate",
    ),
    changes=(
        "a depthwise convolution over the axes stands for the causal one along the sequence: neighbours in a "
        "volume are not neighbours in its raster",
        "no position embedding: it would tie the weights to one patch size; the convolution knows positions",
        "LayerNorm for RMSNorm, no class token",
    ),
    avoided=(
        "a learned position embedding of a fixed size, which stops users at another resolution (hustvl/Vim#112)",
        "a sum of both directions without the half, which users report as NaN in mixed precision (hustvl/Vim#30)",
    ),
    block={"routes": "raster2", "parameters": "direction", "merge": "mean", "gate": "silu", "norm": False},
)
