"""What the decoder has to predict, and how far off it is: masked units, each on its own scale.

The target of He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, arXiv:2111.06377 (normalised pixels),
as MambaMIM uses it (Tang et al., 2024, arXiv:2408.08070): the loss is averaged over the voxels of a unit, then over the
masked units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .masking import mask_at, unit_grid

#: Added to the variance of a unit, as published: a unit of air is all zeros, not noise of unit variance.
EPSILON = 1e-6


def split_units(x: Tensor, units: Sequence[int]) -> Tensor:
    """(B, C, *spatial) -> (B, *units, C, V): the V voxels of every unit, in raster order.

    Raises:
        ValueError: an image that is not a multiple of the units.
    """
    unit_grid(x.shape[2:], units)
    batch, channels, *spatial = x.shape
    sizes = [part for size, n in zip(spatial, units, strict=True) for part in (n, size // n)]
    outer = range(2, 2 + len(sizes), 2)
    inner = range(3, 3 + len(sizes), 2)
    split = x.reshape(batch, channels, *sizes).permute(0, *outer, 1, *inner)
    return split.flatten(2 + len(units))


def join_units(voxels: Tensor, spatial: Sequence[int]) -> Tensor:
    """(B, *units, C, V) -> (B, C, *spatial): the inverse of :func:`split_units`."""
    units = voxels.shape[1:-2]
    inside = [size // n for size, n in zip(spatial, units, strict=True)]
    split = voxels.unflatten(-1, inside)
    axes = range(len(units))
    order = (1 + i if part == 0 else 2 + len(units) + i for i in axes for part in (0, 1))
    return split.permute(0, 1 + len(units), *order).reshape(len(voxels), voxels.shape[-2], *spatial)


def normalised_units(image: Tensor, units: Sequence[int]) -> Tensor:
    """The target: every unit and channel minus its mean, over sqrt(unbiased variance + 1e-6).

    It does not change with a shift of a unit's intensities nor, but for the 1e-6, with their scale; a constant unit
    gives 0.

    Args:
        image: (B, C, *spatial), any float dtype; computed in float32 or, for float64, in float64.
        units: grid of units.

    Returns:
        (B, *units, C, V).

    Raises:
        ValueError: an image that is not a multiple of the units, or units of a single voxel, which have no variance.
    """
    centred, deviation, _ = _standardised(image, units)
    return centred / deviation


def restored(prediction: Tensor, image: Tensor, visible: Tensor, target: Tensor) -> Tensor:
    """An image to look at: visible units as they are, target units as predicted, 0 elsewhere.

    Predicted units get the mean and standard deviation of the true ones, which a network that predicts normalised units
    does not know.

    Args:
        prediction: (B, C, *spatial), of the normalised units.
        image: (B, C, *spatial).
        visible: (B, *units) bool.
        target: (B, *units) bool.

    Returns:
        like ``image``.
    """
    units = visible.shape[1:]
    _, deviation, mean = _standardised(image, units)
    predicted = join_units(split_units(prediction, units) * deviation + mean, image.shape[2:]).to(image.dtype)
    where = [mask_at(mask.to(image.device), image.shape[2:]).unsqueeze(1) for mask in (visible, target)]
    return torch.where(where[0], image, torch.where(where[1], predicted, 0))


def _standardised(image: Tensor, units: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Units minus their mean, their standard deviation, and their mean: (B, *units, C, V or 1)."""
    voxels = split_units(image.to(torch.promote_types(image.dtype, torch.float32)), units)
    if voxels.shape[-1] < 2:
        raise ValueError(
            f"{tuple(units)} units of an image {tuple(image.shape[2:])} are single voxels, which have no variance; "
            "use units of several voxels"
        )
    # A constant unit is exactly 0 from here on; against its rounded mean it could be off by more than EPSILON hides.
    first = voxels[..., :1]
    voxels = voxels - first
    mean = voxels.mean(-1, keepdim=True)
    centred = voxels - mean
    variance = centred.square().sum(-1, keepdim=True) / (voxels.shape[-1] - 1)
    return centred, torch.sqrt(variance + EPSILON), first + mean


def reconstruction_loss(
    prediction: Tensor, image: Tensor, visible: Tensor, *, masked_units: Tensor | int | None = None
) -> Tensor:
    """Squared error of the prediction, averaged over the voxels of a unit and then over the masked units.

    Visible units have no part in it: the gradient on their voxels is exactly 0, whatever prediction and image hold.

    Args:
        prediction: (B, C, *spatial), of the normalised units (:func:`normalised_units`), any float dtype.
        image: (B, C, *spatial).
        visible: (B, *units) bool, True for visible units.
        masked_units: number of masked units to divide by; default: those of this batch. With several processes give
            the number over all of them: the sum of the processes' losses is then the mean over all masked units. A
            wrapper that averages gradients over the processes wants that sum times their number.

    Returns:
        a scalar, in float32 or float64.

    Raises:
        ValueError: shapes that do not fit, or no masked unit in the batch and no number to divide by.
    """
    if prediction.shape != image.shape or visible.dtype != torch.bool or visible.shape[:1] != image.shape[:1]:
        raise ValueError(
            "prediction and image must have one shape, and visible must be bool with their batch size; got "
            f"{tuple(prediction.shape)}, {tuple(image.shape)} and {tuple(visible.shape)} {visible.dtype}"
        )
    if masked_units is None:
        masked_units = math.prod(visible.shape) - int(visible.sum())
        if masked_units == 0:
            raise ValueError("no unit is masked, so there is nothing to predict; raise the mask ratio")
    units = visible.shape[1:]
    target = normalised_units(image, units)
    shown = visible.to(image.device, non_blocking=True)[..., None, None]
    # Before the square: behind it a NaN of a visible voxel would come back as 0 * NaN.
    error = torch.where(shown, 0, split_units(prediction, units).to(target.dtype) - target)
    return error.square().mean((-2, -1)).sum() / masked_units
