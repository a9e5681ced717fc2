"""The last look at a case before it is predicted: are these images that the model can be used on?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medmamba.inference.model import Model

from .channels import refuse_other_grids
from .check import Case
from .check.against_model import model_checks, policies
from .check.case_report import describe
from .reading import Image, Note
from .reading.content import settled


def settle(model: Model, channels: Sequence[Image], *, force: bool = False) -> list[Image]:
    """The channels with finite, plausible values, and with notes on how far they lie from the training images.

    Args:
        model: that they are for; it says which channels are CTs.
        channels: as they were read, one per channel of the model.
        force: take values that no scanner gives.

    Returns:
        The same images; notes about the case as a whole (MM-CK) are with the first.

    Raises:
        ImageRefused: values or grids that must not be used.
    """
    images = [settled(image, policy) for image, policy in zip(channels, policies(model, force=force), strict=True)]
    refuse_other_grids(images)
    report = describe(Case("", tuple(Path(name) for name in model.channel_names)), images)
    found = [finding for check in model_checks(model) for finding in check(report)]
    several = len(images) > 1
    notes = [Note(each.id, f"{each.file}: {each.text}" if several and each.file else each.text) for each in found]
    return [replace(images[0], notes=(*images[0].notes, *notes)), *images[1:]]
