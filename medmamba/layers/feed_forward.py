"""The feed-forward part of a block, plain or multi-scale. Channels last, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import CONV_FUNCTION, conv, same_padding


class FeedForward(nn.Module):
    """Linear to ``ratio`` times the width, GELU, Linear back; with ``scales`` the MS-FFN of MSVM-UNet.

    MS-FFN, with v = GELU(fc1 x) and a depthwise convolution without bias per scale k::

        y = fc2(v + sum over k of conv_k(v))

    (B, *spatial, width) -> same.

    Args:
        width: channels.
        kernel_size: of the stage, per axis. Where it is 1, every scale is 1 too: the plan keeps that axis out of the
            convolutions.
        ratio: hidden channels over ``width``.
        scales: odd kernel sizes; none for a plain MLP.

    Raises:
        ValueError: an even scale.

    Source: Chen et al., "MSVM-UNet", 2024, arXiv:2408.13735 (MS-FFN).
    """

    def __init__(self, width: int, *, kernel_size: Sequence[int], ratio: float = 4.0, scales: Sequence[int] = ()):
        super().__init__()
        hidden = int(ratio * width)
        kernels = [tuple(1 if k == 1 else scale for k in kernel_size) for scale in scales]
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.convs = nn.ModuleList(conv(hidden, hidden, kernel, groups=hidden, bias=False) for kernel in kernels)
        self.fc2 = nn.Linear(hidden, width)
        self.largest = tuple(max(sizes) for sizes in zip(*kernels, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        v = self.act(self.fc1(x))
        if len(self.convs) > 0:
            v = v + self._all_scales(v.movedim(-1, 1)).movedim(1, -1)
        return self.fc2(v)

    def _all_scales(self, v: Tensor) -> Tensor:
        # Convolution is linear in its kernel: the sum of the scales is one convolution with the sum of the centred
        # kernels. One pass over the hidden map, which is the largest of the block, and one copy of it for the backward.
        weights = cast(list[Tensor], [layer.weight for layer in self.convs])
        kernel = reduce(torch.add, [_centred(weight, self.largest) for weight in weights])
        convolve = CONV_FUNCTION[len(self.largest)]
        return convolve(v, kernel, padding=same_padding(self.largest), groups=v.shape[1])


def _centred(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """A kernel (out, in, *k) with zeros around it, so that it has ``size``."""
    margins = [(full - k) // 2 for full, k in zip(size, kernel.shape[2:], strict=True)]
    return F.pad(kernel, [margin for pair in zip(reversed(margins), reversed(margins), strict=True) for margin in pair])
