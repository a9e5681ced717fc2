"""Where an image shows nothing: air outside the body, zeros around a masked brain.

The rule needs no threshold in HU and no guess about the modality. nnU-Net's normalisation of CT clips at the lowest
half percent of what the model's labels looked like in training, so all air that is darker than anything the model
segments has one value there, the lowest. A masked or padded MRI has it where zeros were. A tile that holds this value
alone tells a network nothing. High values are never empty, although they may be clipped as well (contrast agent,
metal), and neither is noise: air in an MRI that was not masked is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Over the range of a channel: what interpolation leaves of the body in the air around it is more than this.
_TOLERANCE = 1e-5
#: Voxels around a body that stay tokens of a scan: as far as a few convolutions look.
MARGIN_VOX = 3


def empty_voxels(image: Tensor, is_masked: Sequence[bool]) -> Tensor:
    """Voxels at which every channel has the value of nothing.

    Args:
        image: (C, D, H, W) float, normalised.
        is_masked: per channel, whether it was normalised within a mask, with zeros left outside.

    Returns:
        (D, H, W) bool: channels at their lowest value, or at 0 where they are masked.
    """
    empty = torch.ones(image.shape[1:], dtype=torch.bool)
    for channel, masked in zip(image, is_masked, strict=True):
        low, high = channel.aminmax()
        nothing = torch.zeros_like(low) if masked else low
        margin = _TOLERANCE * (high - low)
        empty &= (channel >= nothing - margin) & (channel <= nothing + margin)
    return empty


def is_masked(schemes: Sequence[str], use_mask: Sequence[bool]) -> list[bool]:
    """Per channel, whether nnU-Net normalises it within the mask of what is not zero: only its z-score does."""
    return [scheme == "ZScoreNormalization" and mask for scheme, mask in zip(schemes, use_mask, strict=True)]


def surroundings(empty: Tensor, margin_vox: int = MARGIN_VOX) -> Tensor:
    """The part of the empty voxels that surrounds what is there.

    Holes in a body are no surroundings: only what is joined with the border of the image by empty faces counts, and
    of that what is further than a margin from anything else.

    Args:
        empty: (D, H, W) bool.
        margin_vox: at least 0, along each axis; a box, so a corner is as near as a face.

    Returns:
        (D, H, W) bool.
    """
    from scipy import ndimage

    parts, _ = ndimage.label(empty.numpy())
    border = [parts.take(end, axis).ravel() for axis in range(3) for end in (0, -1)]
    outside = np.isin(parts, np.setdiff1d(np.concatenate(border), [0]))
    for axis in range(3):
        outside = ndimage.minimum_filter1d(outside, 2 * margin_vox + 1, axis, mode="nearest")
    return torch.from_numpy(outside)


def air_mask(image: Tensor, threshold: float, margin_vox: int = MARGIN_VOX) -> Tensor:
    """The air around a body in a CT: see :func:`surroundings`.

    Args:
        image: (D, H, W) of one channel, in HU or normalised.
        threshold: what is below is air, in the units of the image; -500 HU lies between air and all tissue.
        margin_vox: see there.

    Returns:
        (D, H, W) bool, True in the air.
    """
    return surroundings(image < threshold, margin_vox)
