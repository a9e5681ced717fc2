"""MSVM-UNet (Chen et al., "MSVM-UNet: Multi-Scale Vision Mamba UNet for Medical Image Segmentation", 2024,
arXiv:2408.13735).

The original is a 2D network: VMamba's v2 blocks (Liu et al., 2024, arXiv:2401.10166; one state per channel, no gate,
a feed-forward part) in the encoder, the same blocks with multi-scale convolutions in their feed-forward part (MSVSS)
in the decoder, large kernel patch expanding (LKPE) between its levels. It is lifted to 3D in two geometries:

``native``    nnU-Net's shape: convolution stages at fine resolution, VSS stages below a token budget, a head per level.
``faithful``  the published shape: a stem of two strided convolutions, four VSS stages, one LKPE to full resolution.

In both, strided convolutions lead down and LKPE up between the VSS stages, and skips are concatenated and projected.
On a depth-1 volume (or an image) the faithful geometry equals the released 2D operators weight for weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isqrt
from typing import Any

from torch import nn

from medmamba.layers import (
    SS2D,
    ChannelsLast,
    ConvDown,
    FeedForward,
    LargeKernelExpand,
    VSSBlock,
    conv,
    drop_path_rates,
    places,
)
from medmamba.mixers import get_core, initialise_step_sizes

from .arguments import (
    MAX_FEATURES,
    VSS_ROUTES,
    Mixer,
    blocks_of,
    check_geometry,
    initialise_linear,
    kernels_of_stages,
    per_stage,
    resolve_first_scan,
    widths_of_stages,
)
from .native import native_unet
from .spec import NetworkSpec, Paper
from .unet import ConcatSkip, Decoder, Encoder, NoSkip, UNet, total_strides

_BLOCKS, _BLOCKS_OF_THIRD_STAGE = 2, 8  # published depths: 2-2-8-2


def msvmunet(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]] | None = None,
    features_per_stage: Sequence[int] | None = None,
    base_features: int | None = None,
    depths: int | Sequence[int] | None = None,
    decoder_depths: int | Sequence[int] = 2,
    geometry: str = "native",
    ssm_mode: str = "scan",
    mixer: Mixer = None,
    routes: str | Sequence[str] | None = None,
    d_state: int = 1,
    expand: float = 1.0,
    mlp_ratio: float = 4.0,
    ffn_scales: Sequence[int] = (1, 3, 5),
    expand_norm: str = "instance",
    two_step_head: bool = False,
    first_scan_stage: int | None = None,
    drop_path_rate: float = 0.2,
    dt_init: Sequence[float] | Mapping[str, Any] | None = None,
    auxiliary_heads: bool = True,
    deep_supervision: bool = False,
) -> nn.Module:
    """MSVM-UNet for nnU-Net's plans, in 2D or 3D (as many dimensions as ``strides`` has per stage).

    Args:
        input_channels: image channels.
        num_classes: classes including background; the result are logits.
        strides: per stage and axis, first stage all ones, as in nnU-Net's ``arch_kwargs``. In the faithful geometry
            the second entry is the stride of the stem (published: 4) and one VSS stage follows per entry.
        kernel_sizes: per stage and axis, odd; default 3. A size of 1 keeps an axis out of the convolutions there.
        features_per_stage: widths; default ``base_features`` doubled per stage (native: capped at nnU-Net's 320 in 3D
            and 512 in 2D). In the faithful geometry one entry per VSS stage, that is ``len(strides) - 1``.
        base_features: width of the first stage; default 32 native, 96 faithful.
        depths: blocks per stage (native: convolution blocks or VSS blocks); a number or one per (VSS) stage. Default:
            8 in the third VSS stage (stride 16 in an isotropic plan), as published, and 2 in every other one.
        decoder_depths: blocks per decoder level, a number or one per level, finest first.
        geometry: "native" or "faithful".
        ssm_mode: "scan", or a control such as "identity" (the scan replaced, everything else kept).
        mixer: name of a mixer (:mod:`medmamba.presets`), or a mapping with ``name`` and changed options, whose blocks
            replace the network's own; arguments that describe those
            (routes, d_state, expand, mlp_ratio, ffn_scales) then have no effect.
        routes: route set or list of routes; default raster6 in 3D, raster4 (VMamba's) in 2D.
        d_state: N, states per channel.
        expand: inner width of a block's scan over its width; 1 in the published code, 2 in the paper's figure.
        mlp_ratio: hidden width of the feed-forward parts over the width.
        ffn_scales: kernel sizes of the depthwise convolutions in the decoder's feed-forward parts; none for plain MLPs.
        expand_norm: norm inside the patch expanding, "instance", or "batch" as published.
        two_step_head: faithful only; go to full resolution in two expansions that halve the width each. The published
            single one has prod(stride) times the first stage's channels, in 3D 6144 at stride 4.
        first_scan_stage: native only; first stage with VSS blocks. Default: the first with at most one token per 4^n
            voxels (stride 4 if isotropic), at the latest the deepest stage.
        drop_path_rate: stochastic depth, rising to this over the encoder and falling to 0 over the decoder.
        dt_init: step sizes of the scans at initialisation: None for Mamba's range, ``(low, high)``, or a mapping with
            ``patch_size`` and ``spacing`` for a range per route (see :mod:`medmamba.mixers.timescale`). Initial
            values are all it changes: any patch runs, and weights load as ever.
        auxiliary_heads: faithful only; heads for deep supervision. False builds the published network, which has none
            (then ``deep_supervision`` gives a list with the final logits only).
        deep_supervision: return logits of ``len(strides) - 1`` levels, finest first, instead of one tensor.

    Returns:
        a module (B, input_channels, *spatial) -> (B, num_classes, *spatial); the input must be divisible by the
        product of the strides (ValueError otherwise).

    Raises:
        ValueError, KeyError: arguments that contradict each other, an unknown geometry, norm, route or ssm_mode.
    """
    check_geometry(geometry)
    ndim = len(total_strides(strides)[0])
    core = partial(get_core(ssm_mode), d_state=d_state, routes=routes or VSS_ROUTES[ndim])
    ss2d = partial(SS2D, core=core, expand=expand, gate=False, conv_bias=False)
    feed_forward = partial(FeedForward, ratio=mlp_ratio)
    parts: dict[str, Any] = {
        "block": blocks_of(partial(VSSBlock, ss2d=ss2d, feed_forward=feed_forward), mixer, ssm_mode),
        "decoder_block": blocks_of(
            partial(VSSBlock, ss2d=ss2d, feed_forward=partial(feed_forward, scales=ffn_scales)), mixer, ssm_mode
        ),
        "up": partial(LargeKernelExpand, norm=expand_norm),
        "fuse": partial(ConcatSkip, ndim=ndim),
    }
    kernels = kernels_of_stages(kernel_sizes, strides)
    if geometry == "faithful":
        if first_scan_stage is not None:
            raise ValueError("first_scan_stage has no meaning in the faithful geometry: every stage scans")
        stages = len(strides) - 1
        network = _faithful_unet(
            input_channels,
            num_classes,
            strides=strides,
            kernels=kernels,
            widths=widths_of_stages(features_per_stage, base_features or 96, stages, cap=None),
            depths=per_stage("depths", _published_depths(stages, 0) if depths is None else depths, stages),
            decoder_depths=per_stage("decoder_depths", decoder_depths, stages - 1),
            drop_path_rate=drop_path_rate,
            two_step_head=two_step_head,
            auxiliary_heads=auxiliary_heads,
            deep_supervision=deep_supervision,
            **parts,
        )
    else:
        if two_step_head:
            raise ValueError("two_step_head has no meaning in the native geometry: it goes up plan stage by plan stage")
        stages = len(strides)
        first_scan = resolve_first_scan(strides, first_scan_stage)
        network = native_unet(
            input_channels,
            num_classes,
            strides=strides,
            kernels=kernels,
            widths=widths_of_stages(features_per_stage, base_features or 32, stages, cap=MAX_FEATURES[ndim]),
            depths=per_stage("depths", _published_depths(stages, first_scan) if depths is None else depths, stages),
            decoder_depths=per_stage("decoder_depths", decoder_depths, stages - 1),
            first_scan=first_scan,
            drop_path_rate=drop_path_rate,
            deep_supervision=deep_supervision,
            down=ConvDown,
            **parts,
        )
    network.apply(initialise_linear)
    initialise_step_sizes(network, dt_init, input_channels=input_channels)
    return network


def _published_depths(stages: int, first_scan: int) -> list[int]:
    return [_BLOCKS_OF_THIRD_STAGE if i == first_scan + 2 else _BLOCKS for i in range(stages)]


def _faithful_unet(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    widths: Sequence[int],
    depths: Sequence[int],
    decoder_depths: Sequence[int],
    block: Callable[..., nn.Module],
    decoder_block: Callable[..., nn.Module],
    up: Callable[..., nn.Module],
    fuse: Callable[[int], nn.Module],
    drop_path_rate: float,
    two_step_head: bool,
    auxiliary_heads: bool,
    deep_supervision: bool,
) -> UNet:
    """The published data flow: stage 0 of the U is the image itself, without blocks and without a skip.

    ``widths``, ``depths`` and ``decoder_depths`` count the VSS stages, ``strides`` and ``kernels`` the image too.
    """
    ndim, stages = len(strides[0]), len(widths)
    where = places(strides, kernels, first=1, skipped=1)
    rates = drop_path_rates(depths, drop_path_rate)
    decoder_rates = [sorted(r, reverse=True) for r in drop_path_rates(decoder_depths, drop_path_rate)]

    def stage(i: int, scan_block: Callable[..., nn.Module], drop_paths: Sequence[float]) -> nn.Module:
        return ChannelsLast(*(scan_block(widths[i], place=where[i], drop_path=rate) for rate in drop_paths))

    # The two halves of the stem's way, and of the head's way back: the finer one first.
    fine, coarse = _two_steps(strides[1])
    half = max(1, widths[0] // 2)
    stem = [ConvDown(input_channels, half, fine, kernels[0]), nn.GELU(), ConvDown(half, widths[0], coarse, kernels[1])]
    if two_step_head:
        final_width = max(1, half // 2)
        final = [up(widths[0], half, coarse, kernels[1]), up(half, final_width, fine, kernels[0])]
    else:
        final_width = widths[0]
        final = [up(widths[0], final_width, strides[1], kernels[1])]
    downs = [ConvDown(widths[i - 1], widths[i], strides[i + 1], kernels[i + 1]) for i in range(1, stages)]
    encoder = Encoder(
        stem=nn.Identity(),
        stages=[nn.Identity(), *(stage(i, block, rates[i]) for i in range(stages))],
        downs=[ChannelsLast(*stem), *(ChannelsLast(down) for down in downs)],
    )
    ups = [up(widths[i + 1], widths[i], strides[i + 2], kernels[i + 2]) for i in range(stages - 1)]
    head_widths = [final_width, *(widths[:-1] if auxiliary_heads else [])]
    decoder = Decoder(
        ups=[ChannelsLast(*final), *(ChannelsLast(expansion) for expansion in ups)],
        fuses=[NoSkip(), *(fuse(width) for width in widths[:-1])],
        stages=[nn.Identity(), *(stage(i, decoder_block, decoder_rates[i]) for i in range(stages - 1))],
        seg_layers=[conv(width, num_classes, [1] * ndim) for width in head_widths],
        deep_supervision=deep_supervision,
    )
    return UNet(encoder, decoder, strides=strides)


def _two_steps(stride: Sequence[int]) -> tuple[list[int], list[int]]:
    """A stride as two, one after the other: per axis two whole factors as equal as possible, the smaller first."""
    smaller = [max(f for f in range(1, isqrt(s) + 1) if s % f == 0) for s in stride]
    return smaller, [s // f for s, f in zip(stride, smaller, strict=True)]


SPEC = NetworkSpec(
    name="msvmunet",
    build="medmamba.networks.msvmunet.msvmunet",
    paper=Paper(
        title="MSVM-UNet: Multi-Scale Vision Mamba UNet for Medical Image Segmentation",
        authors="Chaowei Chen, Li Yu, Shiquan Min, Shunfang Wang",
        year=2024,
        venue="arXiv",
        link="https://arxiv.org/abs/2408.13735",
        dimensions=2,
    ),
    summary="VSS blocks with one state and a feed-forward part, multi-scale in the decoder, large kernel expanding",
    departures=(
        "2D to 3D: strides and kernels per axis of the plan (a multi-scale kernel is 1 where the plan's is); six raster"
        " routes (every axis fastest once) instead of four",
        "native geometry: convolution stages with added skips at fine resolution, nnU-Net widths; the published eight"
        " blocks are in the third scan stage of a plan with any number of them",
        "InstanceNorm instead of BatchNorm in the patch expanding (`expand_norm='batch'` is published); a grid of one"
        " voxel is not normalised",
        "a head per level for nnU-Net's deep supervision (the published network has one)",
        "A_log, D, dt bias and norms really excluded from weight decay",
        "trained from scratch unless weights are imported, no frozen encoder; the decoder's linear layers start like"
        " the encoder's",
        "the code where the figure differs: inner width d instead of 2d (`expand=2` is the figure), a projection after"
        " the concatenated skip",
        "the multi-scale convolutions are computed as one, with the sum of their kernels: the same function",
        "any number of input channels (published: three); inputs that the strides do not divide are refused",
    ),
    defaults={
        "d_state": 1,
        "expand": 1.0,
        "mlp_ratio": 4.0,
        "ffn_scales": [1, 3, 5],
        "expand_norm": "instance",
        "drop_path_rate": 0.2,
    },
    presets={"small": {"base_features": 16, "depths": 1, "decoder_depths": 1, "drop_path_rate": 0.0}},
    block_arguments=("d_state", "expand", "ffn_scales", "mlp_ratio", "routes"),
    adamw={"initial_lr": 5e-4, "weight_decay": 1e-3},
)
