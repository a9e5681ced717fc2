"""MedNeXt (Roy et al., "MedNeXt: Transformer-driven Scaling of ConvNets", MICCAI 2023, arXiv:2303.09975).

A convolutional 3D network without scans: the strong comparison partner, and the body of ``mednextmamba``. Every stage,
every halving and every doubling of the resolution is a MedNeXt block; skips are added. Two geometries:

``native``    strides, kernels, number of stages and widths of nnU-Net's plan.
``faithful``  the published widths (doubled per stage without a cap). With five isotropic stages of stride 2 it is the
              published network, weight for weight: :func:`convert_published` translates its state dict.

Published weights, key by key (i = level, finest first, j = block, the bottleneck is the last level; what follows, such
as ``conv1.weight``, is the same):

=====================  ==========================
published              here
=====================  ==========================
stem                   encoder.stem
enc_block_i.j          encoder.stages.i.j
down_i                 encoder.downs.i
bottleneck.j           encoder.stages.4.j
up_i                   decoder.ups.i
dec_block_i.j          decoder.stages.i.j
out_i.conv_out         decoder.seg_layers.i
out_4.conv_out         left out: nnU-Net has no output at the bottleneck
dummy_tensor           left out: a tensor without effect, for checkpointing in old versions of torch
=====================  ==========================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from medmamba.layers import MedNeXtBlock, MedNeXtDown, MedNeXtUp, conv, conv_transpose

from .arguments import MAX_FEATURES, check_geometry, kernels_of_stages, repeat_last, widths_of_stages
from .spec import NetworkSpec, Paper
from .unet import AddSkip, Decoder, Encoder, UNet, total_strides

CHECKPOINT_STYLES = (None, "outside_block")
_PUBLISHED_LEVELS = 5

#: Published sizes: blocks per stage and expansion, from the finest stage on; the last entry holds for all deeper ones.
SIZES: dict[str, dict[str, int | list[int] | str]] = {
    "S": {"depths": 2, "expansion": 2},
    "B": {"depths": 2, "expansion": [2, 3, 4]},
    "M": {"depths": [3, 4], "expansion": [2, 3, 4], "checkpoint_style": "outside_block"},
    "L": {"depths": [3, 4, 8], "expansion": [3, 4, 8], "checkpoint_style": "outside_block"},
}


def mednext(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]] | None = None,
    kernel_size: int = 3,
    features_per_stage: Sequence[int] | None = None,
    base_features: int | None = None,
    depths: int | Sequence[int] = 2,
    decoder_depths: int | Sequence[int] | None = None,
    expansion: int | Sequence[int] = (2, 3, 4),
    geometry: str = "native",
    checkpoint_style: str | None = None,
    deep_supervision: bool = False,
) -> nn.Module:
    """MedNeXt for nnU-Net's plans, in 2D or 3D (as many dimensions as ``strides`` has per stage); by default size B.

    Args:
        input_channels: image channels.
        num_classes: classes including background; the result are logits.
        strides: per stage and axis, first stage all ones, as in nnU-Net's ``arch_kwargs``.
        kernel_sizes: per stage and axis; where it is 1 the depthwise convolutions do not look along that axis.
        kernel_size: of the depthwise convolutions everywhere else, odd; published are 3 and 5.
        features_per_stage: widths; default ``base_features`` doubled per stage (native: capped at nnU-Net's 320 in 3D
            and 512 in 2D).
        base_features: width of the first stage; default 32.
        depths: blocks per stage; a number, or a list whose last entry holds for all deeper stages.
        decoder_depths: the same for the decoder's levels, finest first; default: as the encoder's stages.
        expansion: hidden channels of a block over its input channels, as ``depths``, for encoder and decoder; that of a
            stage also holds for the way down into it and up into it.
        geometry: "native" or "faithful"; see the module's text.
        checkpoint_style: "outside_block" recomputes every block in the backward pass (published for sizes M and L),
            which trades time for memory; None keeps all activations. Weights and results are the same.
        deep_supervision: return logits of ``len(strides) - 1`` levels, finest first, instead of one tensor.

    Returns:
        a module (B, input_channels, *spatial) -> (B, num_classes, *spatial); the input must be divisible by the
        product of the strides (ValueError otherwise).

    Raises:
        ValueError: arguments that contradict each other, an unknown geometry or checkpoint style, an even kernel.
    """
    require_geometry(geometry)
    ndim, stages = len(total_strides(strides)[0]), len(strides)
    cap = None if geometry == "faithful" else MAX_FEATURES[ndim]
    return mednext_unet(
        input_channels,
        num_classes,
        strides=strides,
        kernels=block_kernels(kernels_of_stages(kernel_sizes, strides), kernel_size),
        widths=widths_of_stages(features_per_stage, base_features or 32, stages, cap=cap),
        depths=depths,
        decoder_depths=decoder_depths,
        expansion=expansion,
        checkpointed=is_checkpointed(checkpoint_style),
        deep_supervision=deep_supervision,
    )


def mednext_unet(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    widths: Sequence[int],
    depths: int | Sequence[int],
    decoder_depths: int | Sequence[int] | None,
    expansion: int | Sequence[int],
    checkpointed: bool,
    deep_supervision: bool,
    encoder_tail: Callable[[int], Iterable[nn.Module]] = lambda stage: (),
) -> UNet:
    """A U-Net of MedNeXt blocks.

    Arguments as :func:`mednext`, with ``kernels`` of the depthwise convolutions and ``widths`` per stage;
    ``encoder_tail(i)`` gives modules, channels first, that follow the blocks of encoder stage i.
    """
    ndim, levels = len(strides[0]), len(strides) - 1
    blocks = repeat_last("depths", depths, levels + 1)
    decoder_blocks = (
        blocks[:levels] if decoder_depths is None else repeat_last("decoder_depths", decoder_depths, levels)
    )
    ratios = repeat_last("expansion", expansion, levels + 1)

    def stage(i: int, depth: int, tail: Iterable[nn.Module] = ()) -> nn.Module:
        body = [
            MedNeXtBlock(widths[i], kernels[i], expansion=ratios[i], checkpointed=checkpointed) for _ in range(depth)
        ]
        return nn.Sequential(*body, *tail)

    encoder = Encoder(
        stem=conv(input_channels, widths[0], [1] * ndim),
        stages=[stage(i, blocks[i], encoder_tail(i)) for i in range(levels + 1)],
        downs=[
            MedNeXtDown(
                widths[i - 1],
                widths[i],
                strides[i],
                kernels[i],
                expansion=ratios[i],
                checkpointed=checkpointed,
            )
            for i in range(1, levels + 1)
        ],
    )
    decoder = Decoder(
        # The kernel of the coarser stage, as on the way down: along an axis that is halved, nnU-Net's plan has 3 there.
        ups=[
            MedNeXtUp(
                widths[i + 1],
                widths[i],
                strides[i + 1],
                kernels[i + 1],
                expansion=ratios[i],
                checkpointed=checkpointed,
            )
            for i in range(levels)
        ],
        fuses=[AddSkip() for _ in range(levels)],
        stages=[stage(i, decoder_blocks[i]) for i in range(levels)],
        seg_layers=[conv_transpose(widths[i], num_classes, [1] * ndim) for i in range(levels)],
        deep_supervision=deep_supervision,
    )
    return UNet(encoder, decoder, strides=strides)


def block_kernels(kernels: Sequence[Sequence[int]], kernel_size: int) -> list[list[int]]:
    """``kernel_size`` in place of every size in the plan's kernels that is not 1."""
    return [[1 if size == 1 else kernel_size for size in kernel] for kernel in kernels]


def require_geometry(geometry: str) -> None:
    """ValueError for a geometry that is neither native nor faithful."""
    check_geometry(geometry)


def is_checkpointed(checkpoint_style: str | None) -> bool:
    """Whether blocks are recomputed; ValueError for a style that is not a published one."""
    if checkpoint_style not in CHECKPOINT_STYLES:
        known = ", ".join(map(repr, CHECKPOINT_STYLES))
        raise ValueError(f"unknown checkpoint_style {checkpoint_style!r}; known: {known}")
    return checkpoint_style is not None


def convert_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the released MedNeXt under our names; the table is in the module's text.

    For ``mednext(..., strides=[[1, 1, 1]] + [[2, 2, 2]] * 4, geometry="faithful")`` of the same size and kernel.

    Args:
        weights: state dict of the released network, trained with deep supervision (it has all heads only then).

    Returns:
        a state dict for ``network.load_state_dict``, which is strict and names what does not fit.

    Raises:
        ValueError: a key that the released network does not have (of a variant with response normalisation, for
            example); the text names it.
    """
    converted = {}
    for key, tensor in weights.items():
        ours = _own_key(key)
        if ours is not None:
            converted[ours] = tensor
    return converted


def _own_key(key: str) -> str | None:
    """Our name of a published weight; None for the two that are left out."""
    bottom = _PUBLISHED_LEVELS - 1
    if key == "dummy_tensor" or key.startswith(f"out_{bottom}.conv_out."):
        return None
    inner = r"(?P<inner>(conv1|norm|conv2|conv3|res_conv)\.(weight|bias))"
    level = r"(?P<i>[0-3])"
    patterns = {
        r"stem\.(?P<inner>weight|bias)": "encoder.stem.{inner}",
        rf"enc_block_{level}\.(?P<j>\d+)\.{inner}": "encoder.stages.{i}.{j}.{inner}",
        rf"down_{level}\.{inner}": "encoder.downs.{i}.{inner}",
        rf"bottleneck\.(?P<j>\d+)\.{inner}": f"encoder.stages.{bottom}.{{j}}.{{inner}}",
        rf"up_{level}\.{inner}": "decoder.ups.{i}.{inner}",
        rf"dec_block_{level}\.(?P<j>\d+)\.{inner}": "decoder.stages.{i}.{j}.{inner}",
        rf"out_{level}\.conv_out\.(?P<inner>weight|bias)": "decoder.seg_layers.{i}.{inner}",
    }
    for pattern, ours in patterns.items():
        match = re.fullmatch(pattern, key)
        if match:
            return ours.format(**match.groupdict())
    raise ValueError(f"{key} is no weight of the released MedNeXt with GroupNorm; nothing was converted")


SPEC = NetworkSpec(
    name="mednext",
    build="medmamba.networks.mednext.mednext",
    paper=Paper(
        title="MedNeXt: Transformer-driven Scaling of ConvNets for Medical Image Segmentation",
        authors="Saikat Roy, Gregor Koehler, Constantin Ulrich, Michael Baumgartner, Jens Petersen, Fabian Isensee, "
        "Paul F. Jaeger, Klaus Maier-Hein",
        year=2023,
        venue="MICCAI",
        link="https://arxiv.org/abs/2303.09975",
        dimensions=3,
    ),
    summary="ConvNeXt blocks at every stage and between stages; no scan, the comparison partner without one",
    departures=(
        "strides and kernels per axis from nnU-Net's plan (the original halves every axis four times, in data "
        "resampled to 1 mm); any number of stages, further ones with blocks and expansion of the deepest published",
        "native geometry: nnU-Net's widths, capped at 320 in 3D and 512 in 2D (the original doubles up to 512 or more)",
        "no head at the bottleneck and no dummy tensor: nnU-Net has one output per level except the deepest",
        "all heads are built also without deep supervision, so that one set of weights serves both",
        "checkpointing recomputes the blocks but not the heads",
        "biases and norms without weight decay (the original decays all); the schedule is nnU-Net's unless the plans "
        "say otherwise (the original trains with AdamW, rate 1e-3, eps 1e-4)",
        "inputs that the strides do not divide are refused",
    ),
    defaults={"depths": 2, "expansion": [2, 3, 4], "kernel_size": 3},
    presets={
        **SIZES,
        **{f"{size}k5": {**arguments, "kernel_size": 5} for size, arguments in SIZES.items()},
        "small": {"base_features": 16, "depths": 1, "expansion": 2},
    },
    adamw={"initial_lr": 1e-3, "weight_decay": 3e-5, "eps": 1e-4},
    has_scans=False,
    published_strides=(1, 2, 2, 2, 2),
)
