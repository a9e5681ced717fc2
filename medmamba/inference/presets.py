"""How much time a prediction may take: three named choices of step, mirroring and skipping of air."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Preset:
    """What a preset decides; fields of :class:`.predictor.ModelPredictor`.

    Attributes:
        step: largest distance of two tiles over their size.
        mirrors: whether to average over reflections, along those axes that the model was trained with.
        skips_air: whether tiles in which there is nothing are left out; see :mod:`.predictor.air`.
    """

    step: float
    mirrors: bool
    skips_air: bool


#: "accurate" is nnU-Net's prediction. A mirrored axis costs a factor of two; the step one of up to 1.5 per axis.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "accurate": Preset(step=0.5, mirrors=True, skips_air=False),
        "balanced": Preset(step=0.5, mirrors=False, skips_air=True),
        "fast": Preset(step=0.75, mirrors=False, skips_air=True),
    }
)
