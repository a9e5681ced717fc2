r"""What rounded weights and clipped scans cost in Dice: copies of a model package on labelled cases.

    python plans/results/weights.py OUT.csv MODEL IMAGES LABELS [--calibrate-on IMAGES] [--quantile 0.9999] \
        [--preset balanced]

MODEL is a package in float32 or float16, IMAGES and LABELS folders of nnU-Net's raw layout. Every copy is written as
`medmamba export MODEL --weights ...` does, and predicts all cases with the preset in this process, with the number of
threads that ``OMP_NUM_THREADS`` says. The row ``float32`` is a copy too: its weights are those of MODEL.
One row per copy, case and label. ``changed`` is the share of voxels with another label than that of ``float32``;
``bytes`` is the whole package, ``predict_s`` the time of the case.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmamba.bench.commit import commit_of
from medmamba.inference.calibrate import scan_input_limits
from medmamba.inference.metrics import dice
from medmamba.inference.model import Model, convert_model, load_model
from medmamba.inference.predictor import ModelPredictor
from medmamba.inference.presets import PRESETS
from medmamba.inference.reading import read_image
from medmamba.inference.settle import settle

#: Name of a row -> type of the weights, and whether the input of the scans is clipped.
COPIES = {
    "float32": ("float32", False),
    "bfloat16": ("bfloat16", False),
    "int8": ("int8", False),
    "int8, clipped": ("int8", True),
    "float32, clipped": ("float32", True),
}
COLUMNS = (
    *("dataset", "case", "copy", "quantile", "calibrated_on", "label", "dice", "changed", "bytes", "predict_s"),
    *("preset", "threads", "weights", "load", "torch", "nnunetv2", "commit"),
)


def rows_of(model: Model, images: Path, labels: Path, preset: str, first: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per case and label; ``first`` takes the labels of the first copy."""
    predictor = ModelPredictor(model, **asdict(PRESETS[preset]))
    predictor.prepare()
    size = sum(path.stat().st_size for path in model.path.iterdir())
    for image in sorted(images.glob("*_0000.nii.gz")):
        case = image.name.removesuffix("_0000.nii.gz")
        channels = settle(model, [read_image(image)])
        started = time.perf_counter()
        found = predictor.predict(channels, should_stop=lambda: False).labels
        seconds = time.perf_counter() - started
        truth = read_image(labels / f"{case}.nii.gz").values
        changed = np.mean(found != first.setdefault(case, found))
        for value, name in model.labels.items():
            if value:
                yield {
                    "case": case,
                    "label": name,
                    "dice": f"{dice(found == value, truth == value):.5f}",
                    "changed": f"{changed:.6f}",
                    "bytes": size,
                    "predict_s": f"{seconds:.3f}",
                    "load": f"{os.getloadavg()[0]:.1f}",
                }


def measure(arguments: argparse.Namespace) -> Iterator[Mapping[str, Any]]:
    source = load_model(arguments.model)
    limits = scan_input_limits(source, arguments.calibrate_on, arguments.quantile)
    shared = {
        "dataset": source.dataset_json["name"],
        "preset": arguments.preset,
        "threads": torch.get_num_threads(),
        "weights": source.id[:12],
        **{name: version(name) for name in ("torch", "nnunetv2")},
        "commit": commit_of(Path(__file__)),
    }
    first: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (precision, is_clipped)) in enumerate(COPIES.items()):
            copy = convert_model(
                source, Path(folder) / str(number), precision=precision, scan_input=limits if is_clipped else None
            )
            about = {
                "copy": name,
                "quantile": arguments.quantile if is_clipped else "",
                "calibrated_on": limits["cases"] if is_clipped else "",
            }
            for row in rows_of(copy, arguments.images, arguments.labels, arguments.preset, first):
                yield shared | about | row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("out", "model", "images", "labels"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--calibrate-on", type=Path, help="images of the clipping; default: IMAGES")
    parser.add_argument("--quantile", type=float, default=0.9999)
    parser.add_argument("--preset", choices=PRESETS, default="accurate")
    arguments = parser.parse_args()
    arguments.calibrate_on = arguments.calibrate_on or arguments.images
    with arguments.out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measure(arguments):
            writer.writerow(row)
            stream.flush()


if __name__ == "__main__":
    main()
