"""How much memory a training needs: a straight line through measurements, over what is counted.

::

    peak bytes = fixed + bytes_per_parameter * parameters + factor * batch * peak

with ``peak`` and ``parameters`` from :func:`medmamba.diagnostics.footprint`. The coefficients of a device
are data (``memory_model.json`` beside this file); ``medmamba calibrate`` measures trainings and fits them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .footprint import Footprint

#: The unit of a GPU's memory: 8 GB are 8 * 2**30 bytes, as on the card.
GB = 2**30
MODEL_FILE = Path(__file__).with_name("memory_model.json")


@dataclass(frozen=True)
class MemoryModel:
    """Coefficients of the line in the module docstring.

    Attributes:
        fixed: bytes of the runtime, whatever the network.
        bytes_per_parameter: weights, gradients, the optimizer's state and casts of the weights.
        factor: measured bytes per counted byte.
        is_calibrated: the coefficients come from measurements on this kind of device.
        source: where they come from, in words.
    """

    fixed: float
    bytes_per_parameter: float
    factor: float
    is_calibrated: bool
    source: str

    @classmethod
    def load(cls, device: str = "cuda", path: Path = MODEL_FILE) -> MemoryModel:
        """The coefficients of a device.

        Raises:
            KeyError: none for this device; the text lists the known ones.
        """
        models = json.loads(path.read_text(encoding="utf-8"))
        if device not in models:
            raise KeyError(f"no memory model for {device!r}; known: {', '.join(models)}")
        return cls(**models[device])

    def peak(self, footprint: Footprint, batch: int) -> float:
        """Peak bytes of a training at this batch size."""
        return self.without_batch(footprint) + batch * self.per_sample(footprint)

    def without_batch(self, footprint: Footprint) -> float:
        """Bytes that do not depend on the batch size."""
        return self.fixed + self.bytes_per_parameter * footprint.parameters

    def per_sample(self, footprint: Footprint) -> float:
        """Bytes that one more sample in the batch adds."""
        return self.factor * footprint.peak

    def largest_batch(self, footprint: Footprint, budget: float) -> int:
        """Largest batch size whose peak stays within a budget in bytes; 0 where not even one sample does."""
        return max(0, int((budget - self.without_batch(footprint)) // self.per_sample(footprint)))
