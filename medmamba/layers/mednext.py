"""MedNeXt's blocks: keep, halve and double the resolution, per axis, in 2D and 3D, channels first.

Source: Roy et al., "MedNeXt: Transformer-driven Scaling of ConvNets for Medical Image Segmentation", MICCAI 2023,
arXiv:2303.09975, sections 2.1 (block), 2.2 (resampling) and 2.3 (UpKern). Parameters have the published names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .convolution import CONV_TRANSPOSE, conv, same_padding

Norm = Callable[[int], nn.Module]


class InstanceGroupNorm(nn.GroupNorm):
    """GroupNorm with one channel per group, the published norm: statistics over the voxels of each channel.

    A channel of a single voxel becomes its bias, in batches of any size. torch's module gives the same in larger
    batches and refuses a batch of one.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, *spatial), eps 1e-6 as in ConvNeXt."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _MedNeXt(nn.Module):
    """What the three blocks share: depthwise convolution, norm, 1^n expansion, GELU, 1^n compression."""

    def __init__(
        self,
        conv1: nn.Module,
        in_channels: int,
        out_channels: int,
        ndim: int,
        *,
        expansion: int,
        norm: Norm,
        checkpointed: bool,
    ):
        super().__init__()
        hidden = expansion * in_channels
        self.conv1 = conv1
        self.norm = norm(in_channels)
        self.conv2 = conv(in_channels, hidden, [1] * ndim)
        self.act = nn.GELU()
        self.conv3 = conv(hidden, out_channels, [1] * ndim)
        self.checkpointed = checkpointed

    def branch(self, x: Tensor) -> Tensor:
        return self.conv3(self.act(self.conv2(self.norm(self.conv1(x)))))

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)


class MedNeXtBlock(_MedNeXt):
    """x + conv3(GELU(conv2(norm(conv1(x))))), conv1 depthwise. (B, C, *spatial) -> same.

    Args:
        channels: C.
        kernel_size: of the depthwise convolution, per axis, odd.
        expansion: hidden channels over C.
        norm: builds the norm from C; default one group per channel, as published.
        checkpointed: recompute the block in the backward pass instead of keeping what is inside.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        *,
        expansion: int,
        norm: Norm = InstanceGroupNorm,
        checkpointed: bool = False,
    ):
        depthwise = conv(channels, channels, kernel_size, groups=channels)
        super().__init__(
            depthwise,
            channels,
            channels,
            len(kernel_size),
            expansion=expansion,
            norm=norm,
            checkpointed=checkpointed,
        )

    def compute(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class MedNeXtDown(_MedNeXt):
    """The block with a strided depthwise convolution, plus a strided 1^n convolution of the input.

    (B, in, *spatial) -> (B, out, *spatial / stride), for sizes that the stride divides.

    Args:
        in_channels: in.
        out_channels: out.
        stride: per axis (published: 2).
        kernel_size: of the depthwise convolution, per axis, odd.
        expansion: hidden channels over ``in_channels``.
        norm: as in :class:`MedNeXtBlock`.
        checkpointed: as in :class:`MedNeXtBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Sequence[int],
        kernel_size: Sequence[int],
        *,
        expansion: int,
        norm: Norm = InstanceGroupNorm,
        checkpointed: bool = False,
    ):
        ndim = len(stride)
        super().__init__(
            conv(in_channels, in_channels, kernel_size, stride=stride, groups=in_channels),
            in_channels,
            out_channels,
            ndim,
            expansion=expansion,
            norm=norm,
            checkpointed=checkpointed,
        )
        self.res_conv = conv(in_channels, out_channels, [1] * ndim, stride=stride)

    def compute(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.res_conv(x)


class MedNeXtUp(_MedNeXt):
    """The block with a transposed depthwise convolution, plus a transposed 1^n convolution of the input.

    Both give (n - 1) stride + 1 voxels per axis; their sum is padded with stride - 1 zero voxels *in front*, as
    published. (B, in, *spatial) -> (B, out, *spatial * stride). Arguments as :class:`MedNeXtDown`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Sequence[int],
        kernel_size: Sequence[int],
        *,
        expansion: int,
        norm: Norm = InstanceGroupNorm,
        checkpointed: bool = False,
    ):
        ndim = len(stride)
        transposed = CONV_TRANSPOSE[ndim]
        super().__init__(
            transposed(
                in_channels,
                in_channels,
                tuple(kernel_size),
                stride=tuple(stride),
                padding=same_padding(kernel_size),
                groups=in_channels,
            ),
            in_channels,
            out_channels,
            ndim,
            expansion=expansion,
            norm=norm,
            checkpointed=checkpointed,
        )
        self.res_conv = transposed(in_channels, out_channels, (1,) * ndim, stride=tuple(stride))
        # F.pad counts from the last axis.
        self.front = [n for s in reversed(tuple(stride)) for n in (s - 1, 0)]

    def compute(self, x: Tensor) -> Tensor:
        return F.pad(self.branch(x) + self.res_conv(x), self.front)


def upkern(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights for a network with larger depthwise kernels from those of the same network with smaller ones (UpKern).

    Every depthwise kernel that has grown is interpolated linearly along its axes (trilinear in 3D, voxel centres
    not aligned at the corners); all other tensors are copied. The sum of a kernel grows with it, which the norm behind
    every MedNeXt convolution takes out again.

    Args:
        weights: state dict of the network with the smaller kernels.
        network: the network with the larger ones; it is read, not changed.

    Returns:
        a state dict for ``network.load_state_dict``.

    Raises:
        ValueError: other keys, or shapes that differ in more than a depthwise kernel's size; the text names them.

    Source: Roy et al., arXiv:2303.09975, section 2.3 and algorithm 1.
    """
    target = network.state_dict()
    strangers = sorted(set(weights) ^ set(target))
    if strangers:
        raise ValueError(
            f"{len(strangers)} keys are in one of the two networks only, e.g. {strangers[0]}; UpKern needs networks "
            "that differ in the kernel size alone"
        )
    depthwise = {f"{name}.weight" for name, module in network.named_modules() if _is_depthwise(module)}
    grown = {}
    for key, wanted in target.items():
        given = weights[key]
        if given.shape == wanted.shape:
            grown[key] = given
            continue
        smaller = given.dim() == wanted.dim() and all(a <= b for a, b in zip(given.shape, wanted.shape, strict=True))
        if key not in depthwise or not smaller or given.shape[:2] != wanted.shape[:2]:
            raise ValueError(
                f"{key} is {tuple(given.shape)} and should become {tuple(wanted.shape)}; UpKern enlarges depthwise "
                "kernels and nothing else"
            )
        mode = {4: "bilinear", 5: "trilinear"}[given.dim()]
        grown[key] = F.interpolate(given, size=wanted.shape[2:], mode=mode, align_corners=False)
    return grown


def _is_depthwise(module: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return isinstance(module, kinds) and module.groups == module.in_channels
