"""A student for CPUs, with and without its teacher, beside teacher and stock network: Dice and seconds per volume.

    python plans/results/distillation.py WORK_FOLDER TEACHER_FOLD RAW_FOLDER_OF_DATASET004 [--jobs 2]
    python plans/results/distillation.py --measure OUT.csv WORK_FOLDER TEACHER_FOLD

TEACHER_FOLD is ``fold_0`` of a run folder on Dataset004 (such as ``hippocampus_model.sh`` makes), WORK_FOLDER the
folder whose preprocessed data the teacher was trained on. Students and stock network share seed, batches, schedule and
patch (:mod:`short_trainings`); the teacher had a schedule of its own. The second command exports every network and
predicts the validation cases of the fold in one process, case by case with all networks in turn, with the preset
``balanced`` and the number of threads that ``OMP_NUM_THREADS`` says; ``cpu_s`` is processor time from the image in
memory to its labels.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from short_trainings import FOLD, STOCK, Arm, Table

DATASET = "Dataset004_Hippocampus"
PRESET = "balanced"
SCHEDULE = {"epochs": 12, "iterations": 40, "val-iterations": 1, "warmup-epochs": 1, "optimizer": "AdamW", "lr": 3e-3}
COLUMNS = (
    *("dataset", "fold", "seed", "network", "case", "label", "dice", "parameters", "cpu_s", "preset", "threads"),
    *("load", "torch", "nnunetv2", "commit"),
)


def table(teacher: str) -> Table:
    """The trainings: stock, student, and student with its teacher."""
    student = Arm("vmunet", "scan", variant="cpu-student")
    return Table(
        description="Train a student for CPUs with and without its teacher.",
        script=__file__,
        arms=[Arm(STOCK), student, Arm("vmunet", "scan", variant="cpu-student", teacher=teacher)],
        schedule=SCHEDULE,
        settings={4: {"spacing": None, "patch": (40, 56, 40)}},
    )


def run_folders(work: Path, teacher: Path) -> Iterator[tuple[str, int | str, Path]]:
    """Name, seed and run folder of every network that is there."""
    yield "teacher", "", teacher.parent
    for seed in (0, 1):
        for arm in table(str(teacher)).arms:
            found = (work / "results" / f"seed_{seed}" / DATASET).glob(f"*__{arm.plans}__3d_fullres")
            for folder in found:
                yield arm.label, seed, folder


def measure(work: Path, teacher: Path) -> Iterator[dict[str, Any]]:
    """One row per network, case and label."""
    import torch

    from medmamba.bench.commit import commit_of
    from medmamba.inference.metrics import dice
    from medmamba.inference.model import export_model, load_model
    from medmamba.inference.predictor import ModelPredictor
    from medmamba.inference.presets import PRESETS
    from medmamba.inference.reading import read_image
    from medmamba.inference.settle import settle

    shared = {"dataset": DATASET, "fold": FOLD, "preset": PRESET, "threads": torch.get_num_threads()}
    shared |= {name: version(name) for name in ("torch", "nnunetv2")} | {"commit": commit_of(Path(__file__))}
    splits = json.loads((work / "preprocessed" / DATASET / "splits_final.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        networks = []
        for number, (label, seed, folder) in enumerate(run_folders(work, teacher)):
            # The stock trainer with a schedule of its own builds what the plans name.
            export_model(folder, Path(scratch) / str(number), folds=[FOLD], trust_plans=True)
            model = load_model(Path(scratch) / str(number))
            predictor = ModelPredictor(model, **asdict(PRESETS[PRESET]))
            predictor.prepare()
            count = sum(p.numel() for p in model.network(FOLD).parameters())
            networks.append(({"network": label, "seed": seed, "parameters": count}, model, predictor))
        for case in splits[FOLD]["val"]:
            image = work / "raw" / DATASET / "imagesTr" / f"{case}_0000.nii.gz"
            truth = read_image(work / "raw" / DATASET / "labelsTr" / f"{case}.nii.gz").values
            for about, model, predictor in networks:
                channels = settle(model, [read_image(image)])
                started = time.process_time()
                found = predictor.predict(channels, should_stop=lambda: False).labels
                seconds = time.process_time() - started
                for value, name in model.labels.items():
                    if value:
                        row = {"case": case, "label": name, "dice": f"{dice(found == value, truth == value):.5f}"}
                        load = {"cpu_s": f"{seconds:.3f}", "load": f"{os.getloadavg()[0]:.1f}"}
                        yield shared | about | row | load


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        parser = argparse.ArgumentParser(description="Dice and seconds of what was trained.")
        for name in ("out", "work", "teacher"):
            parser.add_argument(name, type=Path)
        arguments = parser.parse_args(sys.argv[2:])
        with arguments.out.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(measure(arguments.work.resolve(), arguments.teacher.resolve()))
        return 0
    if sys.argv[1:2] == ["--train"]:
        return table("").main()
    teacher = str(Path(sys.argv.pop(2)).resolve())
    return table(teacher).main()


if __name__ == "__main__":
    sys.exit(main())
