"""VM-UNet (Ruan & Xiang, "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", 2024, arXiv:2402.02491).

The original is a 2D network: a U-shape made of VSS blocks only (VMamba v0: Liu et al., 2024, arXiv:2401.10166).
It is lifted to 3D in two geometries:

``native``    nnU-Net's shape: convolution stages at fine resolution, VSS stages below a token budget, skips after
              the stage and added at every level, transposed convolutions up to full resolution, a head per level.
``faithful``  the published shape: patch embedding, four VSS stages, additive skips taken *before* the stages and
              added before upsampling, the finest skip unused, one final expansion to full resolution.

On a depth-1 volume (or an image) the faithful geometry equals the released 2D operators weight for weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from medmamba.layers import (
    SS2D,
    ChannelsLast,
    PatchEmbed,
    PatchExpand,
    PatchMerge,
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
from .unet import check_divisible, total_strides

_HEAD_FEATURES_PER_WIDTH = 4  # the published final expansion maps 96 channels to 24


def vmunet(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]] | None = None,
    features_per_stage: Sequence[int] | None = None,
    base_features: int | None = None,
    depths: int | Sequence[int] = 2,
    decoder_depths: int | Sequence[int] | None = None,
    geometry: str = "native",
    ssm_mode: str = "scan",
    mixer: Mixer = None,
    routes: str | Sequence[str] | None = None,
    d_state: int = 16,
    expand: float = 2.0,
    first_scan_stage: int | None = None,
    drop_path_rate: float = 0.2,
    dt_init: Sequence[float] | Mapping[str, Any] | None = None,
    auxiliary_heads: bool = True,
    deep_supervision: bool = False,
) -> nn.Module:
    """VM-UNet for nnU-Net's plans, in 2D or 3D (as many dimensions as ``strides`` has per stage).

    Args:
        input_channels: image channels.
        num_classes: classes including background; the result are logits.
        strides: per stage and axis, first stage all ones, as in nnU-Net's ``arch_kwargs``. In the faithful geometry
            the second entry is the patch size of the embedding (published: 4) and one VSS stage follows per entry.
        kernel_sizes: per stage and axis, odd; default 3. A size of 1 keeps an axis out of the convolutions there.
        features_per_stage: widths; default ``base_features`` doubled per stage (native: capped at nnU-Net's 320 in 3D
            and 512 in 2D). In the faithful geometry one entry per VSS stage, that is ``len(strides) - 1``.
        base_features: width of the first stage; default 32 native, 96 faithful.
        depths: blocks per stage (native: convolution blocks or VSS blocks); a number or one per (VSS) stage.
        decoder_depths: blocks per decoder level, finest first; default 2 native, (1, 2, 2, ...) faithful as published.
        geometry: "native" or "faithful".
        ssm_mode: "scan", or a control such as "identity" (the scan replaced, everything else kept).
        mixer: name of a mixer (:mod:`medmamba.presets`), or a mapping with ``name`` and changed options, whose blocks
            replace the network's own; arguments that describe those (routes, d_state, expand) then have no effect.
        routes: route set or list of routes; default raster6 in 3D, raster4 (VMamba's) in 2D.
        d_state: N, states per channel.
        expand: inner width of a block over its width.
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
        ValueError, KeyError: arguments that contradict each other, an unknown geometry, route or ssm_mode.
    """
    ndim = len(total_strides(strides)[0])
    core = partial(get_core(ssm_mode), d_state=d_state, routes=routes or VSS_ROUTES[ndim])
    network = vss_unet(
        input_channels,
        num_classes,
        block=blocks_of(partial(VSSBlock, ss2d=partial(SS2D, core=core, expand=expand)), mixer, ssm_mode),
        strides=strides,
        kernel_sizes=kernel_sizes,
        features_per_stage=features_per_stage,
        base_features=base_features,
        depths=depths,
        decoder_depths=decoder_depths,
        geometry=geometry,
        first_scan_stage=first_scan_stage,
        drop_path_rate=drop_path_rate,
        auxiliary_heads=auxiliary_heads,
        deep_supervision=deep_supervision,
    )
    initialise_step_sizes(network, dt_init, input_channels=input_channels)
    return network


def vss_unet(
    input_channels: int,
    num_classes: int,
    *,
    block: Callable[..., nn.Module],
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]] | None,
    features_per_stage: Sequence[int] | None,
    base_features: int | None,
    depths: int | Sequence[int],
    decoder_depths: int | Sequence[int] | None,
    geometry: str,
    first_scan_stage: int | None,
    drop_path_rate: float,
    auxiliary_heads: bool,
    deep_supervision: bool,
) -> nn.Module:
    """VM-UNet's two shapes with any block, initialised as published: for papers that change the block only.

    Args:
        block: ``block(width, place=..., drop_path=...)``, (B, *spatial, width) channels last to the same.

    All other arguments, the result and the errors as :func:`vmunet`.
    """
    check_geometry(geometry)
    ndim = len(total_strides(strides)[0])
    kernels = kernels_of_stages(kernel_sizes, strides)
    if geometry == "faithful":
        if first_scan_stage is not None:
            raise ValueError("first_scan_stage has no meaning in the faithful geometry: every stage scans")
        stages = len(strides) - 1
        widths = widths_of_stages(features_per_stage, base_features or 96, stages, cap=None)
        network: nn.Module = FaithfulVMUNet(
            input_channels,
            num_classes,
            strides=strides,
            kernels=kernels,
            widths=widths,
            depths=per_stage("depths", depths, stages),
            decoder_depths=per_stage(
                "decoder_depths",
                decoder_depths if decoder_depths is not None else [1] + [2] * (stages - 1),
                stages,
            ),
            block=block,
            drop_path_rate=drop_path_rate,
            auxiliary_heads=auxiliary_heads,
            deep_supervision=deep_supervision,
        )
    else:
        stages = len(strides)
        network = native_unet(
            input_channels,
            num_classes,
            strides=strides,
            kernels=kernels,
            widths=widths_of_stages(features_per_stage, base_features or 32, stages, cap=MAX_FEATURES[ndim]),
            depths=per_stage("depths", depths, stages),
            decoder_depths=per_stage("decoder_depths", 2 if decoder_depths is None else decoder_depths, stages - 1),
            block=block,
            first_scan=resolve_first_scan(strides, first_scan_stage),
            drop_path_rate=drop_path_rate,
            deep_supervision=deep_supervision,
        )
    return network.apply(initialise_linear)


class FaithfulEncoder(nn.Module):
    """Patch embedding and VSS stages; returns the features *before* each stage, and the bottom's result."""

    def __init__(self, embed: nn.Module, stages: Sequence[nn.Module], downs: Sequence[nn.Module]):
        super().__init__()
        self.embed = embed
        self.stages = nn.ModuleList(stages)
        self.downs = nn.ModuleList(downs)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[input of stage 0, ..., input of the last stage, output of the last stage]."""
        x = self.embed(x)
        features = [x]
        for stage, down in zip(self.stages[:-1], self.downs, strict=True):
            x = down(stage(x))
            features.append(x)
        return [*features, self.stages[-1](x)]


class FaithfulDecoder(nn.Module):
    """Published decoder: running feature + pre-stage skip, then expansion, then blocks; the finest skip is unused.

    ``stages`` is ordered finest first; the deepest works on the bottom feature without upsampling. ``seg_layers[0]``
    sees the final expansion at full resolution, ``seg_layers[i]`` the result of stage i - 1.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        ups: Sequence[nn.Module],
        final: nn.Module,
        seg_layers: Sequence[nn.Module],
        *,
        deep_supervision: bool,
    ):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.ups = nn.ModuleList(ups)
        self.final = final
        self.seg_layers = nn.ModuleList(seg_layers)
        self.deep_supervision = deep_supervision

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        x = self.stages[-1](features[-1])
        outputs = {len(self.stages): x}
        for i in reversed(range(len(self.ups))):
            x = self.stages[i](self.ups[i](x + features[i + 1]))
            outputs[i + 1] = x
        outputs[0] = self.final(x)
        if not self.deep_supervision:
            return self.seg_layers[0](outputs[0])
        return [head(outputs[i]) for i, head in enumerate(self.seg_layers)]


class FaithfulVMUNet(nn.Module):
    """The published data flow in 2D or 3D."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        widths: Sequence[int],
        depths: Sequence[int],
        decoder_depths: Sequence[int],
        block: Callable[..., nn.Module],
        drop_path_rate: float,
        auxiliary_heads: bool,
        deep_supervision: bool,
    ):
        super().__init__()
        ndim, stages = len(strides[0]), len(widths)
        where = places(strides, kernels, first=1, skipped=1)
        rates = drop_path_rates(depths, drop_path_rate)
        decoder_rates = [sorted(r, reverse=True) for r in drop_path_rates(decoder_depths, drop_path_rate)]

        def stage(i: int, drop_paths: Sequence[float]) -> nn.Module:
            return ChannelsLast(*(block(widths[i], place=where[i], drop_path=rate) for rate in drop_paths))

        self.encoder = FaithfulEncoder(
            ChannelsLast(PatchEmbed(input_channels, widths[0], strides[1])),
            [stage(i, rates[i]) for i in range(stages)],
            [ChannelsLast(PatchMerge(widths[i - 1], widths[i], strides[i + 1])) for i in range(1, stages)],
        )
        final_width = widths[0] // _HEAD_FEATURES_PER_WIDTH
        head_widths = [final_width, *widths[: stages - 1]] if auxiliary_heads else [final_width]
        self.decoder = FaithfulDecoder(
            [stage(i, decoder_rates[i]) for i in range(stages)],
            [ChannelsLast(PatchExpand(widths[i + 1], widths[i], strides[i + 2])) for i in range(stages - 1)],
            ChannelsLast(PatchExpand(widths[0], final_width, strides[1])),
            [conv(width, num_classes, [1] * ndim) for width in head_widths],
            deep_supervision=deep_supervision,
        )
        self.total_stride = total_strides(strides)[-1]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_divisible(x.shape[2:], self.total_stride)
        return self.decoder(self.encoder(x))


SPEC = NetworkSpec(
    name="vmunet",
    build="medmamba.networks.vmunet.vmunet",
    paper=Paper(
        title="VM-UNet: Vision Mamba UNet for Medical Image Segmentation",
        authors="Jiacheng Ruan, Suncheng Xiang",
        year=2024,
        venue="arXiv",
        link="https://arxiv.org/abs/2402.02491",
        dimensions=2,
    ),
    summary="VSS blocks (S6 along six raster routes) below stride 4, convolutions above",
    departures=(
        "2D to 3D: patch operations per axis of the plan; six raster routes (every axis fastest once) instead of four",
        "native geometry: convolution stages at fine resolution, skips after the stage at every level, nnU-Net widths",
        "a head per level for nnU-Net's deep supervision (the published network has one)",
        "A_log, D, dt bias and norms really excluded from weight decay",
        "any number of input channels (the original repeats one channel to three); logits without sigmoid",
        "inputs that the strides do not divide are refused (the original crops with a warning)",
    ),
    defaults={"depths": 2, "d_state": 16, "expand": 2.0, "drop_path_rate": 0.2},
    presets={
        "small": {"base_features": 16, "depths": 1, "decoder_depths": 1, "d_state": 8, "drop_path_rate": 0.0},
        "cpu-student": {"base_features": 12, "depths": 1, "decoder_depths": 1, "d_state": 8, "drop_path_rate": 0.0},
    },
    adamw={"initial_lr": 1e-3, "weight_decay": 1e-2},
)
