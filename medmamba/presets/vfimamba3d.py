"""VFIMamba: streams that take turns in one sequence."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="vfimamba3d",
    title="VFIMamba3D",
    source=Source(
        title="VFIMamba: Video Frame Interpolation with State Space Models",
        authors="Guozhen Zhang et al.",
        year=2024,
        link="https://arxiv.org/abs/2407.02315",
        code="MCG-NJU/VFIMamba",
    ),
    summary="two streams interleaved voxel by voxel along the fastest axis, S6 with shared weights, channel attention",
    theirs=(
        "streams interleaved token by token, so that the same place of another stream is the next token; shared "
        "weights",
        "channel attention, and a learned weight per channel at the residual",
    ),
    changes=(
        "streams are groups of channels: nnU-Net's first convolution has joined the modalities already",
        "interleaved along the fastest axis of every route, three in a volume",
        "squeeze and excitation inside the mixing instead of a block of convolutions with channel attention behind it; "
        "the learned weight is on the mixing (LayerScale), not on the input",
    ),
    avoided=("the inverse of the two vertical routes, which brings only 25 to 40 % of the positions home",),
    block={"assign": "streams", "groups": 2, "gate": "silu", "modulation": "se", "residual": "scaled"},
)
