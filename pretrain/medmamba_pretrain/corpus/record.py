"""What the manifest says about one source."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["accepted", "duplicate", "excluded", "rejected"]


@dataclass(frozen=True)
class Record:
    """One line of the manifest.

    Attributes:
        source: input folder's label and the path in it, with "/".
        stamp: changes when the source does (size and time).
        status: accepted (a volume of the corpus), duplicate (its content is already there), excluded (by wish) or
            rejected.
        code, reason: of what is not accepted; the code is short and stable.
        volume: content hash of the stored array, 32 hexadecimal digits; also of duplicates, and of excluded sources
            that could be read.
        patient: equal for the scans of one patient.
        modality: "ct" or "mr".
        shape, spacing_mm: of the stored array, D, H, W.
        affine: 4 x 4, index (w, h, d) of the stored array to mm along right, anterior, superior.
        scale, offset: stored * scale + offset is the source's value.
        intensity: summary in the source's units.
        source_shape, source_spacing_mm, source_axes: of the file; D, H, W, and the direction of x, y, z, e.g. "LPS".
        notes: what was odd.
        size_bytes: of the stored file.
        version: of medmamba.
    """

    source: str
    stamp: str
    status: Status
    code: str = ""
    reason: str = ""
    volume: str | None = None
    patient: str = ""
    modality: str = ""
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    affine: tuple[tuple[float, ...], ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    intensity: dict[str, float] = field(default_factory=dict)
    source_shape: tuple[int, ...] = ()
    source_spacing_mm: tuple[float, ...] = ()
    source_axes: str = ""
    notes: tuple[str, ...] = ()
    size_bytes: int = 0
    version: str = ""

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, "", (), {})}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Record:
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        if "affine" in lists:
            lists["affine"] = tuple(tuple(row) for row in content["affine"])
        return cls(**{**content, **lists})
