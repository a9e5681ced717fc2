"""S4ND in the place of the depthwise convolution of a MedNeXt block."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="s4nd3d",
    title="S4ND3D",
    source=Source(
        title="S4ND: Modeling Images and Videos as Multidimensional Signals Using State Spaces",
        authors="Eric Nguyen et al.",
        year=2022,
        link="https://arxiv.org/abs/2210.06583",
        code="state-spaces/s4",
    ),
    summary="a global separable convolution, kernels of a state space model per axis, inside a MedNeXt block",
    theirs=(
        "one kernel per axis and channel from a diagonal state space model, in both directions; their outer "
        "product is the kernel of the volume",
        "it replaces the depthwise convolution of a ConvNeXt-like block",
    ),
    changes=(
        "three products with Toeplitz matrices instead of Fourier transforms: cheaper at the sizes of a patch",
        "kernels of unit energy at every size, 16 complex modes; A is not learned",
        "MedNeXt's block around it: norm, expansion, one residual",
    ),
    avoided=(
        "tensor ranks above 1 that its path for three dimensions does not sum over: here one by default, all summed",
    ),
    block={
        "core": "global_conv",
        "core_options": {"kernel": "s4d"},
        "expand": None,
        "local": None,
        "norm": False,
        "one_residual": True,
        "channel_mix": "mlp",
    },
)
