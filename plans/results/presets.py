"""What the presets of prediction cost in Dice, and in time: a model on cases that it never saw, with each of them.

    python plans/results/presets.py OUT.csv MODEL IMAGES LABELS SPLITS [--fold 0] [--presets accurate balanced fast]

MODEL is a package, IMAGES and LABELS folders of nnU-Net's raw layout, SPLITS nnU-Net's ``splits_final.json``: the
validation cases of the fold are predicted by `medmamba predict`, one run per preset, with the number of threads that
``OMP_NUM_THREADS`` says. One row per case, preset and label. ``predict_s`` is the time from the image in memory to its
labels, as in the report; the first case of a run has to load what the others find loaded.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from medmamba.bench.commit import commit_of
from medmamba.inference.metrics import score_structures
from medmamba.inference.model import load_model
from medmamba.inference.presets import PRESETS
from medmamba.inference.reading import read_image

COLUMNS = (
    *("dataset", "fold", "case", "preset", "label", "dice", "nsd_1mm", "predict_s", "tiles", "tiles_computed"),
    *("threads", "weights", "load", "processor", "torch", "nnunetv2", "commit"),
)


def predict(model: Path, images: Path, cases: list[str], preset: str) -> Iterator[tuple[dict[str, Any], Path]]:
    """Record of every case in the report, with its segmentation."""
    with tempfile.TemporaryDirectory() as folder:
        chosen, out = Path(folder) / "images", Path(folder) / "out"
        chosen.mkdir()
        for case in cases:
            (chosen / f"{case}_0000.nii.gz").symlink_to((images / f"{case}_0000.nii.gz").resolve())
        command = ["medmamba", "predict", "-m", str(model), "-i", str(chosen), "-o", str(out), "--preset", preset]
        subprocess.run([*command, "-device", "cpu", "--no-preview"], check=True)
        records = [json.loads(line) for line in (out / "report.jsonl").read_text(encoding="utf-8").splitlines()]
        (versions,) = [record["versions"] | record["machine"] for record in records if record["record"] == "run"]
        for record in records:
            if record["record"] == "case":
                yield versions | record, out / record["output"]["file"]


def rows_of(record: Mapping[str, Any], segmentation: Path, reference: Path, labels: Mapping[str, int]) -> Iterator[Any]:
    """One row per label of a case."""
    predicted, truth = read_image(segmentation), read_image(reference)
    scores = score_structures(
        predicted.values, truth.values.astype(int), labels, spacing_mm=truth.spacing_mm, tolerance_mm=1.0
    )
    for label, score in scores.items():
        yield {
            "case": record["case"],
            "label": label,
            "dice": f"{score.dice:.4f}",
            "nsd_1mm": f"{score.nsd:.4f}",
            "predict_s": f"{record['stage_seconds']['predicting']:.3f}",
            **{name: record["facts"][name] for name in ("tiles", "tiles_computed")},
            **{name: record[name] for name in ("processor", "torch", "nnunetv2")},
        }


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = load_model(arguments.model)
    labels = {name: value for value, name in model.labels.items() if value}
    cases = json.loads(arguments.splits.read_text(encoding="utf-8"))[arguments.fold]["val"]
    sums = (arguments.model / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    (weights,) = [line.split()[0] for line in sums if line.endswith(f"fold_{arguments.fold}.safetensors")]
    shared = {
        "dataset": model.dataset_json["name"],
        "fold": arguments.fold,
        "threads": torch.get_num_threads(),
        "weights": weights[:12],
        "commit": commit_of(Path(__file__)),
    }
    for preset in arguments.presets:
        for record, segmentation in predict(arguments.model, arguments.images, cases, preset):
            load = f"{os.getloadavg()[0]:.1f}"
            for row in rows_of(record, segmentation, arguments.labels / f"{record['case']}.nii.gz", labels):
                yield shared | {"preset": preset, "load": load} | row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("out", "model", "images", "labels", "splits"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    arguments = parser.parse_args()
    with arguments.out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measure(arguments):
            writer.writerow(row)
            stream.flush()


if __name__ == "__main__":
    main()
