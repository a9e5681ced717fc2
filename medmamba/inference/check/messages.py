"""What is found when cases are held against a model, by id: notes, the cases are predicted all the same.

An id never changes its meaning and is never used again. ``docs/reference/messages.md`` is made of this file.
"""

from __future__ import annotations

from medmamba.inference.reading.messages import Message


def _note(code: str, meaning: str, remedy: str) -> Message:
    return Message(code, meaning, remedy, refuses=False)


MODEL_MESSAGES: dict[str, Message] = {
    # Distance from the training images.
    "MM-CK-001": _note(
        "spacing",
        "along an axis, voxels 1.5 times finer than the finest or coarser than the coarsest of the training images",
        "see that the header has the right spacing; expect less of the result",
    ),
    "MM-CK-002": _note(
        "small",
        "along an axis, it covers less than half of the smallest training image; or less than half a tile of the "
        "network, and less than any training image",
        "give the whole volume, if there is more of it; expect little of the result",
    ),
    "MM-CK-003": _note(
        "large",
        "along an axis, it covers more than twice what the largest training image does",
        "crop to the region that the model was trained on",
    ),
    "MM-CK-004": _note(
        "intensity",
        "the values cover less than a tenth of the range that labelled voxels had in training",
        "see that the right image was given, in the unit of the training images (HU for CT)",
    ),
    "MM-CK-005": _note(
        "hu",
        "a CT without a value below 0, though air has -1000 HU: shifted, or cut to a window",
        "export it again with its rescale slope and intercept",
    ),
    # What prediction takes.
    "MM-CK-010": _note(
        "memory",
        "prediction may take more memory than this machine or container has",
        "give it more, or predict elsewhere",
    ),
    "MM-CK-011": _note(
        "disk",
        "the segmentations may take more room than the output folder has; said once, about all cases",
        "make room, or choose another folder",
    ),
}
