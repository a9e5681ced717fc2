"""What a store was made with; equal for all of its volumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MODALITIES = ("ct", "mr")
DEFAULT_SPACING_MM = 1.5


@dataclass(frozen=True)
class Settings:
    """How images become volumes.

    Attributes:
        modality: "ct" (values are HU) or "mr" (any unit).
        spacing_mm: distance of voxels along D, H, W of the stored arrays, i.e. superior, anterior, right.
        patients: the rule that names the patient of a file; see :func:`.patients.patient_of`.
    """

    modality: str = "ct"
    spacing_mm: tuple[float, float, float] = (DEFAULT_SPACING_MM,) * 3
    patients: str = "file"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "spacing_mm": list(self.spacing_mm)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Settings:
        return cls(**{**content, "spacing_mm": tuple(content["spacing_mm"])})
