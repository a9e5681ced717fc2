"""EfficientViM: the channels are mixed on a few latent tokens."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="efficientvim3d",
    title="EfficientViM3D",
    source=Source(
        title="EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality",
        authors="Sanghyeok Lee et al.",
        year=2024,
        link="https://arxiv.org/abs/2411.15241",
        code="mlvlab/EfficientViM",
    ),
    summary="HSM-SSD: all tokens summed up in 16 states, on which the channels are mixed; no order",
    theirs=(
        "weights of the tokens by a softmax over all of them, channel mixing and gate on the states, read-out "
        "per token",
        "depthwise convolutions in front of mixing and MLP; every part enters as a convex sum with a learned share",
    ),
    changes=(
        "16 states at every stage instead of 49, 25 and 9: a patch has more tokens, and the cost grows with both",
        "no further heads on the states of all stages",
    ),
    avoided=(
        "a decay that is added in front of a softmax over the tokens, and so does nothing: left out",
        "sizes that must be squares",
    ),
    block={
        "core": "hsm_ssd",
        "expand": None,
        "local": None,
        "norm": False,
        "position": "conv",
        "position_twice": True,
        "channel_mix": "mlp",
        "residual": "convex",
    },
)
