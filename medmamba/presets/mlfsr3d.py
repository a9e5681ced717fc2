"""MLFSR: lines of one axis after the other."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="mlfsr3d",
    title="MLFSR3D",
    source=Source(
        title="Mamba-based Light Field Super-Resolution with Efficient Subspace Scanning",
        authors="Ruisheng Gao et al.",
        year=2024,
        link="https://arxiv.org/abs/2406.16083",
        code="RSGao/MLFSR",
    ),
    summary="lines along one axis after the other, to and fro, S6 with eight states",
    theirs=(
        "short sequences: all other axes are batch, the state is cleared at every line",
        "to and fro, with eight states; one subspace after the other, each with a residual; channel attention behind",
    ),
    changes=(
        "single axes of a volume instead of planes of a light field",
        "one projection, one gate and one channel attention for all axes, not for each",
        "one depthwise convolution in front instead of convolutions between two subspaces",
        "routes along thick slices are dropped where the plan does not look along them",
    ),
    block={"routes": "line", "merge": "cascade", "d_state": 8, "gate": "silu", "modulation": "se", "keep_thick": False},
)
