"""MedNeXt blocks with Mamba layers where the tokens are few.

Two networks under one name:

``native``    ours: MedNeXt (:mod:`medmamba.networks.mednext`) in the shape of nnU-Net's plan, with Mamba layers behind
              the blocks of the two deepest stages. Each layer reads one raster in both directions, and the rasters
              change from layer to layer so that every axis is the fastest in turn (Li et al., "Mamba-ND", 2024,
              arXiv:2402.05892).
``faithful``  the network that MambaMIM pretrains and fine-tunes, called HyMamba there (Tang et al., "MambaMIM:
              Pre-training Mamba with State Space Token Interpolation", 2024, arXiv:2408.08070; the shape is that of the
              released code): max pooling, MedNeXt blocks with channel LayerNorm, four Mamba layers at the bottom,
              residual convolution blocks on the skips and in the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.layers import ChannelNorm, ChannelsLast, MedNeXtBlock, SinCosPosition, conv, places
from medmamba.layers.convolution import CONV_TRANSPOSE, INSTANCE_NORM
from medmamba.mixers import Mamba, MambaLayer, get_core, initialise_step_sizes

from .arguments import (
    MAX_FEATURES,
    Mixer,
    kernels_of_stages,
    mixer_blocks,
    repeat_last,
    require_length,
    widths_of_stages,
)
from .mednext import SIZES, block_kernels, is_checkpointed, mednext_unet, require_geometry
from .spec import NetworkSpec, Paper
from .unet import Decoder, Encoder, UNet, total_strides

#: By number of axes: rasters in each of which another axis is the fastest. An image is a volume of depth 1.
ORDERS = {2: ("dhw", "dwh"), 3: ("dhw", "dwh", "hwd")}
#: Widths of the faithful geometry over the stem's: 32-64-128-192-384 as published; further stages keep the last.
_FAITHFUL_WIDTHS = (1, 2, 4, 6, 12)
_MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


def mednextmamba(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]] | None = None,
    kernel_size: int = 3,
    features_per_stage: Sequence[int] | None = None,
    base_features: int | None = None,
    depths: int | Sequence[int] | None = None,
    decoder_depths: int | Sequence[int] | None = None,
    expansion: int | Sequence[int] | None = None,
    mamba_depths: int | Sequence[int] | None = None,
    first_scan_stage: int | None = None,
    geometry: str = "native",
    ssm_mode: str = "scan",
    mixer: Mixer = None,
    routes: str | Sequence[str] | None = None,
    d_state: int = 16,
    expand: float = 2.0,
    dt_init: Sequence[float] | Mapping[str, Any] | None = None,
    checkpoint_style: str | None = None,
    deep_supervision: bool = False,
) -> nn.Module:
    """MedNeXt with Mamba layers for nnU-Net's plans, in 2D or 3D; by default size B.

    Args:
        input_channels: image channels.
        num_classes: classes including background; the result are logits.
        strides: per stage and axis, first stage all ones, as in nnU-Net's ``arch_kwargs``.
        kernel_sizes: per stage and axis, odd; where it is 1 no convolution looks along that axis.
        kernel_size: of the depthwise convolutions everywhere else, odd (published: 3).
        features_per_stage: widths; default ``base_features`` doubled per stage and capped as nnU-Net's. In the faithful
            geometry the published ``channels``: the stem's width, then that behind each stage but the deepest.
        base_features: first of these; default 32.
        depths: MedNeXt blocks per stage; a number, or a list whose last entry holds for all deeper stages. Default 2;
            in the faithful geometry the first stage has none and the deepest 1 by default.
        decoder_depths: the same for the decoder's levels, finest first; default: as the encoder's stages. Faithful:
            residual convolution blocks, default 1.
        expansion: hidden channels of a MedNeXt block over its input channels, as ``depths``. Default (2, 3, 4);
            faithful (2, 2, 4), whose first entry has no block.
        mamba_depths: Mamba layers per stage from ``first_scan_stage`` on; a number or one per such stage. Default 2;
            faithful 4, at the bottom only.
        first_scan_stage: native only; first stage with Mamba layers. Default: the last but one, never the first.
        geometry: "native" or "faithful"; see the module's text.
        ssm_mode: "scan", or a control such as "identity" (the scan replaced, everything else kept).
        mixer: name of a mixer (:mod:`medmamba.presets`), or a mapping with ``name`` and changed options, whose blocks
            replace the network's own; arguments that describe those (routes, d_state, expand) then have no effect.
        routes: route set or list of routes of every layer. Default native: one raster in both directions, dhw, dwh, hwd
            in turn (2D: dhw, dwh); faithful: dhw in both directions.
        d_state: N, states per channel.
        expand: inner width of a Mamba over its width.
        dt_init: step sizes of the scans at initialisation: None for Mamba's range, ``(low, high)``, or a mapping with
            ``patch_size`` and ``spacing`` for a range per route (see :mod:`medmamba.mixers.timescale`).
        checkpoint_style: "outside_block" recomputes every MedNeXt block in the backward pass.
        deep_supervision: return logits of ``len(strides) - 1`` levels, finest first, instead of one tensor.

    Returns:
        a module (B, input_channels, *spatial) -> (B, num_classes, *spatial); the input must be divisible by the
        product of the strides (ValueError otherwise).

    Raises:
        ValueError, KeyError: arguments that contradict each other, an unknown geometry, route or ssm_mode.
    """
    require_geometry(geometry)
    ndim, stages = len(total_strides(strides)[0]), len(strides)
    kernels = kernels_of_stages(kernel_sizes, strides)
    core = partial(get_core(ssm_mode), d_state=d_state)
    checkpointed = is_checkpointed(checkpoint_style)

    first = stages - 1 if geometry == "faithful" else _first_stage_with_layers(first_scan_stage, stages)
    where = places(strides, kernels, first)
    mixed = None if mixer is None else mixer_blocks(mixer, ssm_mode)

    def layer(width: int, stage: int, number: int) -> nn.Module:
        if mixed is not None:
            return mixed(width, place=where[stage])
        order = ORDERS[ndim][0 if geometry == "faithful" else number % ndim]
        path = routes or [order, f"{order}:reverse"]
        here = partial(core, kernel_size=kernels[stage])
        return MambaLayer(width, mamba=partial(Mamba, core=here, routes=path, expand=expand))

    if geometry == "faithful":
        if first_scan_stage is not None:
            raise ValueError("first_scan_stage has no meaning in the faithful geometry: the deepest stage scans")
        base = base_features or 32
        (layers,) = _layers_per_stage(mamba_depths, 4, 1)
        channels = list(features_per_stage) if features_per_stage is not None else _faithful_channels(base, stages)
        require_length("features_per_stage", channels, stages)
        network: nn.Module = hymamba(
            input_channels,
            num_classes,
            strides=strides,
            kernels=kernels,
            depthwise_kernels=block_kernels(kernels, kernel_size),
            channels=channels,
            depths=repeat_last("depths", depths if depths is not None else [2] * (stages - 1) + [1], stages),
            decoder_depths=repeat_last("decoder_depths", decoder_depths or 1, stages - 1),
            expansion=repeat_last("expansion", expansion or (2, 2, 4), stages),
            layers=[layer(channels[-1], -1, i) for i in range(layers)],
            checkpointed=checkpointed,
            deep_supervision=deep_supervision,
        )
    else:
        widths = widths_of_stages(features_per_stage, base_features or 32, stages, cap=MAX_FEATURES[ndim])
        layers_per_stage = [0] * first + _layers_per_stage(mamba_depths, 2, stages - first)
        number = count()

        def tail(i: int) -> Iterable[nn.Module]:
            layers = [layer(widths[i], i, next(number)) for _ in range(layers_per_stage[i])]
            return [ChannelsLast(*layers)] if layers else []

        network = mednext_unet(
            input_channels,
            num_classes,
            strides=strides,
            kernels=block_kernels(kernels, kernel_size),
            widths=widths,
            depths=2 if depths is None else depths,
            decoder_depths=decoder_depths,
            expansion=(2, 3, 4) if expansion is None else expansion,
            checkpointed=checkpointed,
            deep_supervision=deep_supervision,
            encoder_tail=tail,
        )
    network.apply(_initialise_linear)
    initialise_step_sizes(network, dt_init, input_channels=input_channels)
    return network


def hymamba(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    depthwise_kernels: Sequence[Sequence[int]],
    channels: Sequence[int],
    depths: Sequence[int],
    decoder_depths: Sequence[int],
    expansion: Sequence[int],
    layers: Sequence[nn.Module],
    checkpointed: bool,
    deep_supervision: bool,
) -> UNet:
    """The shape of MambaMIM's network, with heads for deep supervision.

    Args:
        input_channels: image channels.
        num_classes: classes including background.
        strides: per stage and axis; the pooling in front of a stage.
        kernels: of the dense convolutions, per stage and axis.
        depthwise_kernels: of the MedNeXt blocks.
        channels: one per stage: width of the stem, then of what each stage but the deepest hands on.
        depths: MedNeXt blocks per stage; the first has none.
        decoder_depths: residual blocks per level, finest first.
        expansion: per stage, of the MedNeXt blocks.
        layers: modules (B, *spatial, C) -> same for the tokens of the deepest stage.
        checkpointed: recompute the MedNeXt blocks in the backward pass.
        deep_supervision: see :class:`medmamba.networks.unet.Decoder`.
    """
    ndim, bottom = len(strides[0]), len(strides) - 1
    # channels[i] comes into stage i, channels[i + 1] leaves it; the deepest keeps its width.
    after = [*channels[1:], channels[-1]]

    def blocks(i: int) -> list[nn.Module]:
        return [
            MedNeXtBlock(
                channels[i],
                depthwise_kernels[i],
                expansion=expansion[i],
                norm=ChannelNorm,
                checkpointed=checkpointed,
            )
            for _ in range(depths[i])
        ]

    widen = [conv(a, b, kernel) for (a, b), kernel in zip(pairwise(channels), kernels, strict=False)]
    stages = [widen[0], *(nn.Sequential(*blocks(i), widen[i]) for i in range(1, bottom))]
    deepest = nn.Sequential(*blocks(bottom), ChannelsLast(SinCosPosition(), *layers))
    encoder = Encoder(
        stem=conv(input_channels, channels[0], kernels[0]),
        stages=[*stages, deepest],
        downs=[_MAX_POOL[ndim](tuple(stride), tuple(stride)) for stride in strides[1:]],
    )

    def decode(i: int) -> nn.Module:
        plain = partial(ResidualConvBlock, kernel_size=kernels[i], norm=INSTANCE_NORM[ndim], bias=False)
        body = [plain(2 * after[i], after[i]), *(plain(after[i], after[i]) for _ in range(decoder_depths[i] - 1))]
        if i == 0:
            body.append(ResidualConvBlock(after[0], channels[0], kernel_size=kernels[0], norm=ChannelNorm))
        return nn.Sequential(*body)

    def up(i: int) -> nn.Module:
        stride = tuple(strides[i + 1])
        return CONV_TRANSPOSE[ndim](after[i + 1], after[i], stride, stride=stride, bias=False)

    decoder = Decoder(
        ups=[up(i) for i in range(bottom)],
        fuses=[
            ConcatSkip(ResidualConvBlock(after[i], after[i], kernel_size=kernels[i], norm=ChannelNorm))
            for i in range(bottom)
        ],
        stages=[decode(i) for i in range(bottom)],
        seg_layers=[conv(channels[0] if i == 0 else after[i], num_classes, [1] * ndim) for i in range(bottom)],
        deep_supervision=deep_supervision,
    )
    return UNet(encoder, decoder, strides=strides)


class ResidualConvBlock(nn.Module):
    """LeakyReLU(norm2(conv2(LeakyReLU(norm1(conv1(x))))) + shortcut(x)); slope 0.01.

    (B, in, *spatial) -> (B, out, *spatial). The shortcut is the identity, or norm3(conv3(x)) with a 1^n convolution
    where the width changes.

    Args:
        in_channels: in.
        out_channels: out.
        kernel_size: of conv1 and conv2, per axis, odd.
        norm: builds a norm from a width.
        bias: of the convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: Sequence[int],
        norm: Callable[[int], nn.Module],
        bias: bool = True,
    ):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, kernel_size, bias=bias)
        self.norm1 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size, bias=bias)
        self.norm2 = norm(out_channels)
        self.act = nn.LeakyReLU(0.01)
        self.widens = in_channels != out_channels
        if self.widens:
            self.conv3 = conv(in_channels, out_channels, [1] * len(kernel_size), bias=bias)
            self.norm3 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(y + (self.norm3(self.conv3(x)) if self.widens else x))


class ConcatSkip(nn.Module):
    """Joins the upsampled feature with the processed skip along the channels, upsampled one first."""

    def __init__(self, process: nn.Module):
        super().__init__()
        self.process = process

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([x, self.process(skip)], dim=1)


def _faithful_channels(base: int, stages: int) -> list[int]:
    return [base * factor for factor in repeat_last("widths", _FAITHFUL_WIDTHS, stages)]


def _first_stage_with_layers(chosen: int | None, stages: int) -> int:
    """The chosen stage, or the last but one; never the first, whose tokens are the voxels of the image."""
    if chosen is None:
        return max(1, stages - 2)
    if not 0 < chosen < stages:
        raise ValueError(f"first_scan_stage must lie in 1..{stages - 1} for {stages} stages, got {chosen}")
    return chosen


def _layers_per_stage(given: int | Sequence[int] | None, default: int, stages: int) -> list[int]:
    """Mamba layers of each of the ``stages`` stages that have some."""
    if given is None or isinstance(given, int):
        values = [default if given is None else given] * stages
    else:
        values = list(given)
    require_length("mamba_depths", values, stages)
    if min(values) < 1:
        raise ValueError(f"mamba_depths must be at least 1 everywhere, got {values}")
    return values


def _initialise_linear(module: nn.Module) -> None:
    """Initialisation of MambaMIM's token stack: Linear weights Xavier-uniform, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SPEC = NetworkSpec(
    name="mednextmamba",
    build="medmamba.networks.mednextmamba.mednextmamba",
    paper=Paper(
        title="MambaMIM: Pre-training Mamba with State Space Token Interpolation",
        authors="Fenghe Tang, Bingkun Nian, Yingtai Li, Jie Yang, Liu Wei, S. Kevin Zhou",
        year=2024,
        venue="arXiv",
        link="https://arxiv.org/abs/2408.08070",
        dimensions=3,
    ),
    summary="MedNeXt blocks, and Mamba layers along alternating rasters at the two deepest stages",
    departures=(
        "native geometry: our own network, MedNeXt in nnU-Net's shape with Mamba layers at the two deepest stages, no "
        "position code; each layer reads one raster both ways, every axis fastest in turn",
        "faithful geometry: the released network; strides and kernels per axis and heads for deep supervision added",
        "both directions are scanned (the released code holds weights for two and runs the forward one, as routes dhw "
        "does here)",
        "position codes are computed for the grid at hand (the original stores them for patches of 96 cubed and runs "
        "at that size only)",
        "step sizes start in Mamba's range, and the route weights as in VMamba (the released initialiser sets the step "
        "bias to 0, that is a step of 0.7, and draws the step projection Xavier-uniform)",
        "A_log, D, dt bias and norms excluded from weight decay",
        "inputs that the strides do not divide are refused",
    ),
    defaults={"kernel_size": 3, "d_state": 16, "expand": 2.0},
    presets={
        **SIZES,
        "small": {"base_features": 16, "depths": 1, "expansion": 2, "mamba_depths": 1, "d_state": 8},
    },
    adamw={"initial_lr": 1e-3, "weight_decay": 3e-5, "eps": 1e-4},
    published_strides=(1, 2, 2, 2, 2),
)
