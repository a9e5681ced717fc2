"""Segment what is in memory: nibabel and SimpleITK images, arrays, or files, and give back the same kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .predictor import ModelPredictor
from .reading import Image, read_image
from .reading.geometry import affine_from_lps
from .reading.messages import refused
from .settle import settle


def segment(
    predictor: ModelPredictor, *channels: Any, spacing_mm: Sequence[float] | None = None, force: bool = False
) -> Any:
    """Labels of one case.

    Args:
        predictor: of a model package.
        channels: one per channel of the model, all of one kind and on one grid: nibabel images, SimpleITK images,
            paths, :class:`medmamba.inference.reading.Image`, or arrays (D, H, W) of any real dtype. An array says
            nothing of the patient: its axes are taken to run towards superior, anterior and right.
        spacing_mm: of arrays, along D, H, W; of nothing else.
        force: take values that no scanner gives.

    Returns:
        uint8, or uint16 for models with labels above 255: a nibabel or a SimpleITK image on the grid of the first
        channel, an ``Image`` for a path or an ``Image``, an array (D, H, W) for arrays.

    Raises:
        ImageRefused: an image that must not be used, with its id; see ``docs/reference/messages.md``.
        TypeError: something else than these, or arrays without spacing.
        ValueError: not as many channels as the model has.
    """
    wanted = list(predictor.channel_names)
    if len(channels) != len(wanted):
        raise ValueError(f"the model has {len(wanted)} channels ({', '.join(wanted)}), {len(channels)} were given")
    images = settle(predictor.model, [_image(channel, spacing_mm) for channel in channels], force=force)
    labels = predictor.predict(images, should_stop=lambda: False).labels
    return _like(channels[0], labels, images[0])


def _image(given: Any, spacing_mm: Sequence[float] | None) -> Image:
    if isinstance(given, np.ndarray):
        if spacing_mm is None or len(spacing_mm) != 3 or min(spacing_mm) <= 0:
            raise TypeError(f"an array needs spacing_mm=(d, h, w) above 0, not {spacing_mm!r}")
        return _scalar_volume(given, np.diag([*reversed(list(spacing_mm)), 1.0]))
    if spacing_mm is not None:
        raise TypeError(f"a {type(given).__name__} has a spacing of its own; leave spacing_mm out")
    if isinstance(given, Image):
        return given
    if isinstance(given, str | os.PathLike):
        return read_image(Path(given))
    if _is_nibabel(given):
        return _scalar_volume(np.asanyarray(given.dataobj).T, np.asarray(given.affine, np.float64))
    if _is_itk(given):
        return _from_itk(given)
    raise TypeError(f"a {type(given).__name__} is no nibabel or SimpleITK image, path, Image or array")


def _like(given: Any, labels: NDArray[Any], image: Image) -> Any:
    if isinstance(given, np.ndarray):
        return labels
    if _is_nibabel(given):
        import nibabel

        return nibabel.Nifti1Image(labels.T, given.affine)
    if _is_itk(given):
        import SimpleITK

        result = SimpleITK.GetImageFromArray(labels)
        result.CopyInformation(given)
        return result
    return replace(image, values=labels)


def _scalar_volume(values: NDArray[Any], affine: NDArray[np.float64]) -> Image:
    """
    Raises:
        ImageRefused: not three axes, not numbers, or no place.
    """
    if values.ndim != 3:
        raise refused("MM-IO-023" if values.ndim == 4 else "MM-IO-025", f"{values.ndim} axes; give one 3D volume")
    if values.dtype.kind == "c":
        raise refused("MM-IO-021", f"voxels are {values.dtype}, not real numbers; give magnitude or phase")
    if values.dtype.kind not in "iufb":
        raise refused("MM-IO-020", f"voxels are {values.dtype}, not real numbers; give one scalar channel")
    if not np.isfinite(affine).all() or not np.abs(np.linalg.det(affine[:3, :3])) > 0:
        raise refused("MM-IO-030", "its affine is no position: NaN, an axis without length, or axes in one plane")
    return Image(values.astype(np.uint8) if values.dtype.kind == "b" else values, affine)


def _from_itk(image: Any) -> Image:
    import SimpleITK

    if image.GetNumberOfComponentsPerPixel() != 1:
        raise refused("MM-IO-020", f"voxels are {image.GetPixelIDTypeAsString()}; give one scalar channel")
    values = SimpleITK.GetArrayFromImage(image)
    if image.GetDimension() != 3:
        return _scalar_volume(values, np.eye(4))  # refuses
    direction = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    return _scalar_volume(values, affine_from_lps(direction, np.asarray(image.GetOrigin())))


def _is_nibabel(given: Any) -> bool:
    from nibabel.spatialimages import SpatialImage

    return isinstance(given, SpatialImage)


def _is_itk(given: Any) -> bool:
    import SimpleITK

    return isinstance(given, SimpleITK.Image)
