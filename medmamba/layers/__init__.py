"""Parts that networks are built from. Need torch only."""

from __future__ import annotations

from .channels_last import ChannelsLast
from .convolution import ConvBlock, conv, conv_transpose, same_padding
from .drop_path import DropPath, drop_path_rates
from .feed_forward import FeedForward
from .mednext import ChannelNorm, InstanceGroupNorm, MedNeXtBlock, MedNeXtDown, MedNeXtUp, upkern
from .parameters import exempt_from_decay, parameter_groups
from .place import Place, places
from .position import SinCosPosition
from .resample import ConvDown, LargeKernelExpand, PatchEmbed, PatchExpand, PatchMerge
from .vss import SS2D, VSSBlock

__all__ = [
    "SS2D",
    "ChannelNorm",
    "ChannelsLast",
    "ConvBlock",
    "ConvDown",
    "DropPath",
    "FeedForward",
    "InstanceGroupNorm",
    "LargeKernelExpand",
    "MedNeXtBlock",
    "MedNeXtDown",
    "MedNeXtUp",
    "PatchEmbed",
    "PatchExpand",
    "PatchMerge",
    "Place",
    "SinCosPosition",
    "VSSBlock",
    "conv",
    "conv_transpose",
    "drop_path_rates",
    "exempt_from_decay",
    "parameter_groups",
    "places",
    "same_padding",
    "upkern",
]
