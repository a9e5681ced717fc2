"""Convolutions for any number of spatial dimensions, and nnU-Net's convolution block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

# By number of spatial dimensions.
CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONV_FUNCTION: dict[int, Callable[..., Tensor]] = {2: F.conv2d, 3: F.conv3d}
BATCH_NORM: dict[int, Callable[..., nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, Callable[..., nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def same_padding(kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Padding that keeps the size at stride 1.

    Raises:
        ValueError: an even kernel, which has no such symmetric padding.
    """
    if any(k % 2 == 0 for k in kernel_size):
        raise ValueError(f"kernel sizes must be odd on every axis, got {tuple(kernel_size)}")
    return tuple(k // 2 for k in kernel_size)


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int] | int = 1,
    groups: int = 1,
    bias: bool = True,
) -> nn.Module:
    """Convolution with "same" padding in as many dimensions as ``kernel_size`` has entries (2 or 3)."""
    stride = tuple(stride) if isinstance(stride, Sequence) else stride
    return CONV[len(kernel_size)](
        in_channels,
        out_channels,
        tuple(kernel_size),
        stride=stride,
        padding=same_padding(kernel_size),
        groups=groups,
        bias=bias,
    )


def conv_transpose(in_channels: int, out_channels: int, stride: Sequence[int]) -> nn.Module:
    """Transposed convolution whose kernel equals its stride: exact upsampling by ``stride``."""
    return CONV_TRANSPOSE[len(stride)](in_channels, out_channels, tuple(stride), stride=tuple(stride))


class ConvBlock(nn.Module):
    """Convolution, InstanceNorm (affine, eps 1e-5), LeakyReLU (0.01): nnU-Net's plain block.

    Source: Isensee et al., "nnU-Net", Nature Methods 18, 2021.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int] | int = 1,
    ):
        super().__init__()
        self.conv = conv(in_channels, out_channels, kernel_size, stride=stride)
        self.norm = INSTANCE_NORM[len(kernel_size)](out_channels, affine=True)
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))
