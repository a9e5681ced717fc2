"""VSSD: state space duality without an order, normalised."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="vssd3d",
    title="VSSD3D",
    source=Source(
        title="VSSD: Vision Mamba with Non-Causal State Space Duality",
        authors="Yuheng Shi et al.",
        year=2024,
        link="https://arxiv.org/abs/2407.18559",
        code="YuHengsss/VSSD",
    ),
    summary="non-causal SSD (a weighted linear attention), softmax attention at the coarsest stage",
    theirs=(
        "one positive weight per token and head, one summary of all tokens, read by every token",
        "a linear gate, position convolutions in front of mixing and MLP, softmax attention at the last stage",
    ),
    changes=(
        "the weights of the tokens are divided by their sum; the decay rate of a head then cancels and is left out",
        "heads of 16 channels at every stage",
    ),
    avoided=(
        "a sum that grows with the number of tokens, until the direct path vanishes behind the norm and the result "
        "depends on the patch size (users of the operator report NaN, YuHengsss/VSSD#5; the cause is open there)",
    ),
    block={
        "core": "nc_ssd",
        "d_state": 64,
        "gate": "linear",
        "position": "conv",
        "position_twice": True,
        "channel_mix": "mlp",
        "deepest": {"core": "attention", "d_state": 16, "expand": 1.0, "gate": None, "local": None},
    },
)
