"""Parts that networks are built from. Need torch only."""

from __future__ import annotations

from .channels_last import ChannelsLast
from .convolution import ConvBlock, conv, conv_transpose, same_padding
from .drop_path import DropPath, drop_path_rates
from .feed_forward import FeedForward
from .parameters import exempt_from_decay, parameter_groups
from .resample import ConvDown, LargeKernelExpand, PatchEmbed, PatchExpand, PatchMerge
from .vss import SS2D, VSSBlock

__all__ = [
    "SS2D",
    "ChannelsLast",
    "ConvBlock",
    "ConvDown",
    "DropPath",
    "FeedForward",
    "LargeKernelExpand",
    "PatchEmbed",
    "PatchExpand",
    "PatchMerge",
    "VSSBlock",
    "conv",
    "conv_transpose",
    "drop_path_rates",
    "exempt_from_decay",
    "parameter_groups",
    "same_padding",
]
