"""The native geometry: nnU-Net's shape with scans where the tokens are few.

Convolution stages at fine resolution, stages of a network's own blocks from ``first_scan`` on, skips after the stage at
every level, transposed convolutions up to full resolution, a head per level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from medmamba.layers import (
    ChannelsLast,
    ConvBlock,
    PatchExpand,
    PatchMerge,
    conv,
    conv_transpose,
    drop_path_rates,
    places,
)

from .unet import AddSkip, Decoder, Encoder, UNet

#: (width in, width out, stride, kernel of the coarser of the two stages) -> channels-last module.
Resample = Callable[[int, int, Sequence[int], Sequence[int]], nn.Module]


def _merge(in_channels: int, out_channels: int, stride: Sequence[int], kernel_size: Sequence[int]) -> nn.Module:
    return PatchMerge(in_channels, out_channels, stride)


def _expand(in_channels: int, out_channels: int, stride: Sequence[int], kernel_size: Sequence[int]) -> nn.Module:
    return PatchExpand(in_channels, out_channels, stride)


def native_unet(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    widths: Sequence[int],
    depths: Sequence[int],
    decoder_depths: Sequence[int],
    block: Callable[..., nn.Module],
    decoder_block: Callable[..., nn.Module] | None = None,
    first_scan: int,
    drop_path_rate: float,
    deep_supervision: bool,
    down: Resample = _merge,
    up: Resample = _expand,
    fuse: Callable[[int], nn.Module] | None = None,
) -> UNet:
    """A U-Net of convolutions above ``first_scan`` and of ``block`` from there on.

    Args:
        input_channels: image channels.
        num_classes: classes including background.
        strides: per stage and axis, as in nnU-Net's plans.
        kernels: per stage and axis.
        widths: per stage.
        depths: blocks per stage.
        decoder_depths: blocks per decoder level, finest first.
        block: ``block(width, place=..., drop_path=...)``, (B, *spatial, width) channels last to the same.
        decoder_block: the same in the decoder; default ``block``.
        first_scan: first stage with these blocks.
        drop_path_rate: stochastic depth, rising to this over the encoder's blocks and falling to 0 over the decoder's.
        deep_supervision: see :class:`medmamba.networks.unet.Decoder`.
        down: ``down(width in, width out, stride, kernel of the coarser stage)`` into a stage with these blocks,
            channels last; default patch merging.
        up: the same on the way up, into a level with these blocks; default patch expanding.
        fuse: ``fuse(width)`` joins the upsampled feature of a level with these blocks, (B, width, *spatial), with the
            skip; default addition, which the levels of convolutions always use.
    """
    ndim, levels = len(strides[0]), len(strides) - 1
    where = places(strides, kernels, first_scan)
    scan_depths = [depth if i >= first_scan else 0 for i, depth in enumerate(depths)]
    scan_decoder_depths = [depth if i >= first_scan else 0 for i, depth in enumerate(decoder_depths)]
    rates = drop_path_rates(scan_depths, drop_path_rate)
    # The decoder runs from the deepest level to the finest: rates fall towards the output.
    decoder_rates = [sorted(r, reverse=True) for r in drop_path_rates(scan_decoder_depths, drop_path_rate)]

    def stage(i: int, depth: int, drop_paths: Sequence[float], scan_block: Callable[..., nn.Module]) -> nn.Module:
        if i < first_scan:
            return nn.Sequential(*(ConvBlock(widths[i], widths[i], kernels[i]) for _ in range(depth)))
        return ChannelsLast(*(scan_block(widths[i], place=where[i], drop_path=rate) for rate in drop_paths))

    def go_down(i: int) -> nn.Module:
        if i < first_scan:
            return ConvBlock(widths[i - 1], widths[i], kernels[i], stride=strides[i])
        return ChannelsLast(down(widths[i - 1], widths[i], strides[i], kernels[i]))

    def go_up(i: int) -> nn.Module:
        if i < first_scan:
            return conv_transpose(widths[i + 1], widths[i], strides[i + 1])
        return ChannelsLast(up(widths[i + 1], widths[i], strides[i + 1], kernels[i + 1]))

    encoder = Encoder(
        stem=ConvBlock(input_channels, widths[0], kernels[0]),
        stages=[stage(i, depths[i], rates[i], block) for i in range(levels + 1)],
        downs=[go_down(i) for i in range(1, levels + 1)],
    )
    decoder = Decoder(
        ups=[go_up(i) for i in range(levels)],
        fuses=[AddSkip() if fuse is None or i < first_scan else fuse(widths[i]) for i in range(levels)],
        stages=[stage(i, decoder_depths[i], decoder_rates[i], decoder_block or block) for i in range(levels)],
        seg_layers=[conv(widths[i], num_classes, [1] * ndim) for i in range(levels)],
        deep_supervision=deep_supervision,
    )
    return UNet(encoder, decoder, strides=strides)
