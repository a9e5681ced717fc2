"""What the runner itself says about a case, by id; what is said about images is in the reading room's catalogue.

An id never changes its meaning and is never used again. ``docs/reference/report.md`` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One entry.

    Attributes:
        code: short name.
        remedy: what its user can do, where the text of the event does not say it.
    """

    code: str
    remedy: str


MESSAGES: dict[str, Message] = {
    "MM-RN-001": Message("memory", "use a machine or a container with more memory, or a preset that needs less"),
    "MM-RN-002": Message("gpu-memory", "close what else uses the GPU, or predict on the CPU"),
    "MM-RN-003": Message("internal", "report it with this line of the report"),
    "MM-RN-004": Message("changing", "wait until the file is complete, then start the same command again"),
    "MM-RN-005": Message("labels", "report it with this line of the report"),
    "MM-RN-006": Message("not-equal", "check disk and memory, then start the same command again"),
    "MM-RN-007": Message("not-written", "check the output folder, then start the same command again"),
    "MM-RN-008": Message("disk-full", "make room, then start the same command again"),
    # Notes: the case is done.
    "MM-RN-020": Message("replaced", "look into your copies, if somebody had changed the file by hand"),
    "MM-RN-021": Message("tried-before", "see whether the system stopped the process for its memory"),
    "MM-RN-022": Message("no-preview", "see that there is room on the disk; the segmentation is complete"),
}
