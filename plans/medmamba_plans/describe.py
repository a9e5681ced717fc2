"""What ``medmamba plan`` prints about the plans that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmamba.diagnostics import GB, MemoryModel
from medmamba.nnunet import folders
from medmamba.nnunet.distillation import Distillation
from medmamba.nnunet.schedule import Schedule
from medmamba_plans.planner import predicted_peak


def describe_configurations(plans: Mapping[str, Any], folder: Path, budget_gb: float | None = None) -> list[str]:
    """Print patch, batch, predicted memory and data of every configuration; return those without preprocessed data."""
    missing = []
    peaks = _predicted_gb(plans, folder)
    for name, own in plans["configurations"].items():
        configuration = folders.configuration_of(plans, name)
        shape = "x".join(map(str, configuration["patch_size"]))
        memory = f", {peaks[name]:.1f} GB" if name in peaks else ""
        data = configuration["data_identifier"]
        print(f"  {name}: patch {shape}, batch {configuration['batch_size']}{memory}, data {data}")
        if "inherits_from" not in own and not (folder / data).is_dir():
            missing.append(name)
    if peaks:
        _describe_memory(peaks, budget_gb)
    return missing


def describe_schedule(schedule: Schedule, of: str = "schedule") -> None:
    warmup = f" after a warm-up of {schedule.warmup_epochs} epochs" if schedule.warmup_epochs else ""
    print(
        f"  {of}: {schedule.num_epochs} epochs of {schedule.num_iterations_per_epoch} iterations, "
        f"{schedule.optimizer}, learning rate {schedule.initial_lr:g}{warmup}"
    )


def describe_distillation(distillation: Distillation) -> None:
    folds = ", ".join(distillation.sha256)
    print(
        f"  teacher: {distillation.teacher}, fold {folds}, {distillation.checkpoint}; weight {distillation.weight:g}, "
        f"temperature {distillation.temperature:g}"
    )


def _predicted_gb(plans: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Predicted peak of every configuration; nothing where dataset.json, and so channels and classes, are missing."""
    dataset_json = folders.read_dataset_json_beside(folder / f"{plans['plans_name']}.json")
    if dataset_json is None:
        return {}
    return {name: predicted_peak(plans, name, dataset_json) / GB for name in plans["configurations"]}


def _describe_memory(peaks: Mapping[str, float], budget_gb: float | None) -> None:
    model = MemoryModel.load("cuda")
    print(
        "  GB: predicted peak of a training in bfloat16 with SGD, the context of the GPU included"
        + ("" if model.is_calibrated else "; an UNCALIBRATED estimate, not yet compared with a GPU")
    )
    above = [name for name, peak in peaks.items() if budget_gb is not None and peak > budget_gb]
    if above:
        print(f"  above {budget_gb:g} GB: {', '.join(above)} (the patch or batch that you asked for)")
