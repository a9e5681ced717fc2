"""Results of finished trainings as rows: one per fold and run, and paired differences between arms.

Everything is read from the folders that nnU-Net writes, so trainings of stock networks and of other people's trainers
stand in the same table as ours.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.command import CommandError
from medmamba.nnunet.folders import configuration_of

SUMMARY = "*__*__*/fold_*/validation/summary.json"


@dataclass(frozen=True)
class Arm:
    """What was trained: everything that a result's place in a table depends on, except fold and run."""

    dataset: str
    network: str
    ssm_mode: str
    trainer: str
    plans: str
    configuration: str

    @property
    def label(self) -> str:
        return f"{self.network} {self.ssm_mode}".strip()


@dataclass(frozen=True)
class Result:
    """One finished fold.

    Attributes:
        arm: what was trained.
        run: name of the folder above the dataset's, e.g. of one seed.
        fold: as nnU-Net names it.
        parameters: of the network.
        facts: schedule and sizes, for the table.
        dice: mean Dice per class and case, (cases, classes); NaN where a class is in neither segmentation.
        cases: their names, in the order of the rows of ``dice``.
        classes: their names, in the order of its columns.
    """

    arm: Arm
    run: str
    fold: str
    parameters: int
    facts: Mapping[str, Any]
    dice: NDArray[np.float64]
    cases: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def dice_of_classes(self) -> list[float]:
        """Mean over the cases, per class (nnU-Net's ``mean``)."""
        return [float(value) for value in np.nanmean(self.dice, axis=0)]

    @property
    def dice_of_cases(self) -> dict[str, float]:
        """Mean over the classes that a case has; NaN if it has none."""
        present = np.isfinite(self.dice)
        total = np.where(present, self.dice, 0).sum(axis=1)
        with np.errstate(invalid="ignore"):
            return dict(zip(self.cases, map(float, total / present.sum(axis=1)), strict=True))


@dataclass(frozen=True)
class Difference:
    """Paired comparison of two arms over the cases that both have, averaged over runs first.

    Attributes:
        first, second: the arms.
        cases: number of pairs.
        runs: number of runs of either.
        mean: mean of first minus second, in Dice.
        low, high: 95 % confidence interval of the mean over cases (Student's t).
        p: two-sided Wilcoxon signed-rank test; 1 if all differences are zero.
    """

    first: Arm
    second: Arm
    cases: int
    runs: int
    mean: float
    low: float
    high: float
    p: float


def find_results(folders: Sequence[Path]) -> list[Result]:
    """Every fold with a finished validation.

    Args:
        folders: of one dataset in ``nnUNet_results`` each (``.../DatasetXXX_Name``).

    Raises:
        CommandError: a folder without a finished fold, or with files that nnU-Net did not write.
    """
    found = []
    for folder in folders:
        summaries = sorted(folder.glob(SUMMARY))
        if not summaries:
            raise CommandError(
                f"no finished fold in {folder}; give folders of nnUNet_results that hold "
                "TRAINER__PLANS__CONFIGURATION/fold_N/validation/summary.json"
            )
        found += [_read(path) for path in summaries]
    return found


def _read(summary: Path) -> Result:
    fold, model = summary.parents[1], summary.parents[2]
    trainer, plans_name, configuration = model.name.split("__")
    try:
        plans, dataset, scores = (
            json.loads(path.read_text()) for path in (model / "plans.json", model / "dataset.json", summary)
        )
        labels = {name: label for name, label in dataset["labels"].items() if _key(label) in scores["mean"]}
        metrics = [case["metrics"] for case in scores["metric_per_case"]]
        per_case = [[_dice(of_case[_key(label)]) for label in labels.values()] for of_case in metrics]
        files = [Path(case["reference_file"]).name for case in scores["metric_per_case"]]
        cases = tuple(name.removesuffix(dataset["file_ending"]) for name in files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{model} cannot be read ({type(error).__name__}: {error}); it must hold plans.json, dataset.json and "
            f"{summary.relative_to(model)} as nnU-Net writes them"
        ) from error
    merged = configuration_of(plans, configuration)
    network, mode, parameters = _network(plans, merged, dataset)
    log = "\n".join(path.read_text() for path in sorted(fold.glob("training_log_*.txt")))
    seconds = [float(value) for value in re.findall(r"Epoch time: ([\d.]+) s", log)]
    return Result(
        arm=Arm(model.parent.name, network, mode, trainer, plans_name, configuration),
        run=model.parent.parent.name,
        fold=fold.name.removeprefix("fold_"),
        parameters=parameters,
        facts={
            "epochs": len(seconds),
            "batch_size": merged["batch_size"],
            "patch": "x".join(map(str, merged["patch_size"])),
            "seconds_per_epoch_median": round(statistics.median(seconds), 2) if seconds else "",
        },
        dice=np.array(per_case, dtype=np.float64).reshape(len(cases), len(labels)),
        cases=cases,
        classes=tuple(labels),
    )


def _key(label: int | Sequence[int]) -> str:
    """How nnU-Net spells a label, or the labels of a region, in ``summary.json``."""
    return str(label) if isinstance(label, int) else str(tuple(label))


def _dice(metrics: Mapping[str, Any]) -> float:
    value = metrics["Dice"]
    return float("nan") if value is None else float(value)


def _network(
    plans: dict[str, Any], configuration: Mapping[str, Any], dataset: Mapping[str, Any]
) -> tuple[str, str, int]:
    """Name, what stands in the place of its scan, and parameters."""
    import torch

    from medmamba.networks import get_spec
    from medmamba.nnunet.architecture import build_network, network_ends, network_of

    block = configuration["architecture"]
    name = network_of(block)
    mode = ""
    if name is not None and get_spec(name).has_scans:
        mode = block["arch_kwargs"].get("ssm_mode", "scan")
        mixer = block["arch_kwargs"].get("mixer")
        if mixer is not None:
            name = f"{name}+{mixer if isinstance(mixer, str) else mixer['name']}"
    with torch.device("meta"):
        network = build_network(block, *network_ends(plans, configuration, dataset))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return name or block["network_class_name"].rpartition(".")[2], mode, parameters


def differences(results: Sequence[Result]) -> list[Difference]:
    """Each network with its scan against its controls, and against every network without a scan of ours.

    Only arms of the same dataset and configuration are compared. Folds and runs count as further cases and as
    repetitions: a case's Dice is averaged over the runs first, so that every case is one pair.
    """
    arms = list(dict.fromkeys(result.arm for result in results))
    found = []
    for first in (arm for arm in arms if arm.ssm_mode == "scan"):
        for second in arms:
            same_data = (second.dataset, second.configuration) == (first.dataset, first.configuration)
            is_partner = second.network == first.network or not second.ssm_mode
            if same_data and is_partner and second.ssm_mode != "scan":
                found.append(_difference(first, second, results))
    return found


def _difference(first: Arm, second: Arm, results: Sequence[Result]) -> Difference:
    from scipy import stats

    (a, runs_a), (b, runs_b) = (_averaged(arm, results) for arm in (first, second))
    pairs = np.array([(a[case], b[case]) for case in a if case in b], dtype=np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    delta = pairs[:, 0] - pairs[:, 1]
    mean = low = high = p = float("nan")
    if len(delta) > 1:
        mean = float(delta.mean())
        half = float(stats.t.ppf(0.975, len(delta) - 1) * delta.std(ddof=1) / np.sqrt(len(delta)))
        low, high = mean - half, mean + half
        p = 1.0 if not delta.any() else float(stats.wilcoxon(delta).pvalue)
    return Difference(first, second, len(delta), min(runs_a, runs_b), mean, low, high, p)


def _averaged(arm: Arm, results: Sequence[Result]) -> tuple[dict[str, float], int]:
    """Dice of every case, averaged over the runs that have it, and the number of runs."""
    values: dict[str, list[float]] = {}
    chosen = [result for result in results if result.arm == arm]
    for result in chosen:
        for case, dice in result.dice_of_cases.items():
            values.setdefault(case, []).append(dice)
    return {case: float(np.mean(dice)) for case, dice in values.items()}, len({result.run for result in chosen})


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row of plain values per result, for a CSV; classes are columns ``dice_<class>``."""
    return [
        {
            **vars(result.arm),
            "run": result.run,
            "fold": result.fold,
            "parameters": result.parameters,
            **result.facts,
            "cases": len(result.cases),
            "dice_mean": round(float(np.mean(result.dice_of_classes)), 4),
            **{
                f"dice_{name}": round(value, 4)
                for name, value in zip(result.classes, result.dice_of_classes, strict=True)
            },
            "source": "measured",
        }
        for result in results
    ]


def difference_rows(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """One row of plain values per comparison, for a CSV."""
    return [
        {
            "dataset": one.first.dataset,
            "configuration": one.first.configuration,
            "first": one.first.label,
            "second": one.second.label,
            "first_plans": one.first.plans,
            "second_plans": one.second.plans,
            "cases": one.cases,
            "runs": one.runs,
            "dice_difference": round(one.mean, 4),
            "low_95": round(one.low, 4),
            "high_95": round(one.high, 4),
            "p_wilcoxon": float(f"{one.p:.2g}"),
        }
        for one in found
    ]


def write_csv(path: Path, content: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the union of their columns, ``source`` last; empty where a row has no value.

    Raises:
        CommandError: the file cannot be written.
    """
    columns = sorted(dict.fromkeys(name for row in content for name in row), key=lambda name: name == "source")
    try:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(content)
    except OSError as error:
        raise CommandError(f"{path} cannot be written ({error.strerror}); choose another file") from error
