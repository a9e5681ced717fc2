"""Long convolutions in the place of the depthwise convolution of a MedNeXt block."""

from __future__ import annotations

from .spec import MixerSpec, Source

SPEC = MixerSpec(
    name="longconv3d",
    title="LongConv3D",
    source=Source(
        title="Simple Hardware-Efficient Long Convolutions for Sequence Modeling",
        authors="Daniel Y. Fu et al.",
        year=2023,
        link="https://arxiv.org/abs/2302.06646",
        code="HazyResearch/safari",
    ),
    summary="a separable convolution with free, squashed kernels of 32 tokens to either side inside a MedNeXt block",
    theirs=(
        "a free kernel per channel as long as the sequence, squashed: every weight is moved towards 0 by a threshold, "
        "and is 0 below it",
    ),
    changes=(
        "a kernel per axis, in both directions; their outer product is the kernel of the volume",
        "three products with Toeplitz matrices instead of Fourier transforms: cheaper at the sizes of a patch",
        "32 weights per axis and direction at any patch: a shorter axis uses the first ones, on a longer one tokens "
        "further apart do not see each other here",
        "MedNeXt's block around it: norm, expansion, one residual",
    ),
    avoided=("a default threshold above all first weights, so that kernel and gradient are exactly 0",),
    block={
        "core": "global_conv",
        "core_options": {"kernel": "free"},
        "expand": None,
        "local": None,
        "norm": False,
        "one_residual": True,
        "channel_mix": "mlp",
    },
)
