"""The images of one case lie on one grid."""

from __future__ import annotations

from collections.abc import Sequence

from medmamba.inference.check.case_report import SAME_GRID
from medmamba.inference.reading import Image
from medmamba.inference.reading.geometry import corners_apart
from medmamba.inference.reading.messages import refused


def refuse_other_grids(channels: Sequence[Image]) -> None:
    """Compare all with the first, by the measure of ``medmamba check``.

    Raises:
        ImageRefused: MM-IO-061.
    """
    first = channels[0]
    for k, other in enumerate(channels[1:], 1):
        if other.values.shape != first.values.shape:
            text = f"channel 0 has {first.values.shape} voxels, channel {k} {other.values.shape}"
            raise refused("MM-IO-061", f"{text}; resample them to one grid")
        apart = corners_apart(first.affine, other.affine, first.values.shape[::-1])
        if not apart <= SAME_GRID * min(first.spacing_mm):
            raise refused(
                "MM-IO-061", f"channel {k} lies {apart:.3g} mm away from channel 0; resample them to one grid"
            )
