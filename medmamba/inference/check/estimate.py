"""What prediction takes: time, memory and disk, before anything is predicted."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from medmamba.inference.machine import usable_bytes
from medmamba.inference.orientation import orientation_of
from medmamba.inference.predictor.demand import Demand, image_bytes, num_passes
from medmamba.inference.predictor.model_predictor import ModelPredictor

from .case_report import CaseReport
from .cost import Cost, Totals
from .finding import Finding
from .show import size_text
from .trial import Trial

#: Room for the header of a segmentation and for the names in it, generously.
_HEADER_BYTES = 2**16
#: Room for what the allocator keeps; without it the tightest of the measured cases is at the bound.
_KEPT_SHARE = 1.05
#: What the first case loads: parts of scipy and skimage.
_FIRST_CASE_BYTES = 2**26
_FLOAT32_BYTES = 4
#: int32, which the labels of a case are while some of them are above 255.
_WIDE_LABEL_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """Says what cases take with a model.

    Attributes:
        predictor: with the settings of the prediction.
        trial: what one pass takes here; None to say nothing about time and memory.
    """

    predictor: ModelPredictor
    trial: Trial | None = None

    def added_to(self, report: CaseReport) -> CaseReport:
        """The report with its cost, and with a note where this needs more memory than there is; refused ones as is."""
        if report.status == "refused":
            return report
        cost = self.cost(report)
        return replace(report, cost=cost, findings=report.findings + tuple(self._findings(cost)))

    def cost(self, report: CaseReport) -> Cost:
        """Of a case that can be read."""
        model = self.predictor.model
        orientation = None if model.orientation == "file" else orientation_of(report.shape, np.array(report.affine))
        axes = (0, 1, 2) if orientation is None else orientation.axes
        shape = [report.shape[axis] for axis in axes]
        spacing = [report.spacing_mm[axis] for axis in axes]
        demand = Demand.of(self.predictor, shape, spacing)
        voxels = int(np.prod(report.shape, dtype=object))
        held = image_bytes(voxels, [np.dtype(channel.dtype).itemsize for channel in report.channels], orientation)
        passes = demand.tiles * num_passes(self.predictor)
        return Cost(
            tiles=demand.tiles,
            passes=passes,
            seconds=None if self.trial is None else round(passes * self.trial.seconds, 3),
            peak_ram_mb=self._peak_ram_mb(demand, held),
            output_bytes=voxels * (1 if max(model.labels) < 256 else 2) + _HEADER_BYTES,
        )

    def totals(self, reports: Iterable[CaseReport], output: Path | None = None) -> Totals:
        """Of all cases of a folder.

        Args:
            output: where segmentations will go; it need not exist.
        """
        reports = list(reports)
        costs = [report.cost for report in reports if report.cost is not None]
        trial = self.trial
        output_bytes = sum(cost.output_bytes for cost in costs)
        free = None if output is None else _free_bytes(output)
        findings = []
        if free is not None and free < output_bytes:
            text = f"up to {size_text(output_bytes)} of segmentations, and {size_text(free)} are free"
            findings.append(Finding.of("MM-CK-011", text))
        return Totals(
            model=self.predictor.id,
            cases=len(reports),
            predictable=len(costs),
            passes=sum(cost.passes for cost in costs),
            passes_per_tile=num_passes(self.predictor),
            seconds_per_pass=None if trial is None else round(trial.seconds, 6),
            threads=None if trial is None else trial.threads,
            seconds=None if trial is None else round(sum(cost.seconds or 0 for cost in costs), 3),
            peak_ram_mb=max((cost.peak_ram_mb for cost in costs if cost.peak_ram_mb is not None), default=None),
            usable_ram_mb=self._usable_ram_mb,
            output_bytes=output_bytes,
            free_bytes=free,
            findings=tuple(findings),
        )

    def _peak_ram_mb(self, demand: Demand, held: int) -> int | None:
        """Bound on the memory of the process: base + 64 MiB + weights + 1.05 (image + the larger of two stages).

        base: the process with one network, measured; 64 MiB: what the first case loads, where 22 were measured;
        weights: of the other folds, 4 bytes per parameter; image and stages: see
        :mod:`medmamba.inference.predictor.demand`.
        """
        trial, model = self.trial, self.predictor.model
        if trial is None or trial.base_bytes is None:
            return None
        others = len(self.predictor.folds or model.folds) - 1
        label_bytes = 1 if max(model.labels) < 256 else _WIDE_LABEL_BYTES
        stage = max(demand.preparing_bytes(), demand.predicting_bytes(trial.pass_bytes, label_bytes))
        weights = others * model.parameters * _FLOAT32_BYTES
        return (trial.base_bytes + _FIRST_CASE_BYTES + weights + int(_KEPT_SHARE * (held + stage))) >> 20

    @cached_property
    def _usable_ram_mb(self) -> int | None:
        usable = usable_bytes()
        return None if usable is None else usable >> 20

    def _findings(self, cost: Cost) -> Iterable[Finding]:
        need, usable = cost.peak_ram_mb, self._usable_ram_mb
        if need is not None and usable is not None and need > usable:
            text = f"up to {size_text(need << 20)}, this machine or container has {size_text(usable << 20)}"
            yield Finding.of("MM-CK-010", text)


def _free_bytes(folder: Path) -> int | None:
    """Of the disk of a folder, or of the nearest one above it that exists."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None
