"""Collect the Dice of trained nnU-Net folders into one CSV of ``plans/results``.

    python tools/collect_results.py RESULTS/DatasetXXX_Name [--predictions FOLDER] --out FILE.csv

Every finished fold gives one row: who trained what for how long, Dice per class and mean over the validation cases
(nnU-Net's ``summary.json``), seconds per epoch (its training log). ``FOLDER/TRAINER-PLANS/summary.json`` adds the
Dice of the same images through ``nnUNetv2_predict`` and the seconds it took. Development only: the package does not
import this.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medmamba.bench.commit import commit_of


def fold_rows(dataset: Path, predictions: Path | None) -> list[dict[str, Any]]:
    """One row per fold with a finished validation, in the order of their folder names."""
    summaries = sorted(dataset.glob("*__*__*/fold_*/validation/summary.json"))
    if not summaries:
        raise FileNotFoundError(f"no finished fold in {dataset}: expected TRAINER__PLANS__CONFIG/fold_N/validation")
    return [fold_row(path, predictions) for path in summaries]


def has_scans(architecture: dict[str, Any]) -> bool:
    """Whether an architecture block names a network of ours with scans, which runs them unless it says otherwise."""
    from medmamba.networks import NETWORKS

    return any(spec.has_scans for spec in NETWORKS.values() if spec.build == architecture["network_class_name"])


def fold_row(summary: Path, predictions: Path | None) -> dict[str, Any]:
    fold, model = summary.parents[1], summary.parents[2]
    trainer, plans_name, configuration = model.name.split("__")
    plans = json.loads((model / "plans.json").read_text())
    labels = json.loads((model / "dataset.json").read_text())["labels"]
    architecture = plans["configurations"][configuration]["architecture"]
    scores = json.loads(summary.read_text())
    log = "\n".join(path.read_text() for path in sorted(fold.glob("training_log_*.txt")))
    epochs = [float(value) for value in re.findall(r"Epoch time: ([\d.]+) s", log)]
    row: dict[str, Any] = {
        "dataset": model.parent.name,
        "network": architecture["network_class_name"].rpartition(".")[2],
        "ssm_mode": architecture["arch_kwargs"].get("ssm_mode", "scan" if has_scans(architecture) else ""),
        "trainer": trainer,
        "plans": plans_name,
        "configuration": configuration,
        "fold": fold.name.removeprefix("fold_"),
        "epochs": len(epochs),
        "batch_size": plans["configurations"][configuration]["batch_size"],
        "cases": len(scores["metric_per_case"]),
        "dice_mean": dice(scores["foreground_mean"]),
    }
    for name, label in labels.items():
        if str(label) in scores["mean"]:
            row[f"dice_{name}"] = dice(scores["mean"][str(label)])
    row["seconds_per_epoch_median"] = round(statistics.median(epochs), 2) if epochs else ""
    predicted = predictions / f"{trainer}-{plans_name}" if predictions else None
    if predicted is not None and (predicted / "summary.json").is_file():
        again = json.loads((predicted / "summary.json").read_text())
        row["dice_mean_nnUNetv2_predict"] = dice(again["foreground_mean"])
        row["seconds_nnUNetv2_predict"] = (predicted / "seconds.txt").read_text().strip()
    return {**row, "medmamba": version("medmamba"), "commit": commit_of(Path(__file__)), "source": "measured"}


def dice(scores: dict[str, Any]) -> float:
    return round(float(scores["Dice"]), 4)


def write(rows: list[dict[str, Any]], out: Path) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    tail = ["medmamba", "commit", "source"]
    columns = [name for name in columns if name not in tail] + tail
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Collect the Dice of trained nnU-Net folders into one CSV.")
    parser.add_argument("dataset", type=Path, help="folder of one dataset in nnUNet_results")
    parser.add_argument("--predictions", type=Path, help="folder of TRAINER-PLANS folders of nnUNetv2_predict")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    arguments = parser.parse_args(argv)
    try:
        rows = fold_rows(arguments.dataset, arguments.predictions)
    except (FileNotFoundError, KeyError) as error:
        print(f"collect_results: {error}", file=sys.stderr)
        return 2
    write(rows, arguments.out)
    print(f"{len(rows)} rows in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
