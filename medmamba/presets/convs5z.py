"""ConvS5 along the slices: a linear recurrence of maps, convolutions in the plane."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="convs5z",
    title="ConvS5z",
    source=Source(
        title="Convolutional State Space Models for Long-Range Spatiotemporal Modeling",
        authors="Jimmy T.H. Smith et al.",
        year=2023,
        link="https://arxiv.org/abs/2310.19694",
        code="NVlabs/ConvSSM",
    ),
    summary="a diagonal linear state space along the slices, to and fro, convolutions in the plane; for thick slices",
    theirs=(
        "a linear recurrence with complex diagonal states along one axis, convolutions in the plane, a gate",
        "the same for every voxel of a slice, not selective",
    ),
    changes=(
        "to and fro: slices have no order in time",
        "computed as one matrix product per channel instead of a scan: a volume has few slices",
        "one depthwise convolution in the plane in front of the recurrence instead of full ones into the states and "
        "out of them; channels are mixed by the linear maps",
        "a gate as Mamba has it, and an inverted residual behind instead of a block of a ResNet",
        "steps grow with the distance of the slices",
    ),
    block={
        "core": "global_conv",
        "core_options": {"kernel": "s4d", "axes": [0]},
        "local": "in_plane",
        "gate": "silu",
        "channel_mix": "inverted_residual",
    },
)
