"""Short trainings of many arms on equal terms, for the tables of this folder: one process and one core per training.

All arms of a dataset share data, fold, patch, batch size, optimizer, learning rate and number of iterations, and are
trained once per seed; only the network differs. Networks are the ``small`` variants, the stock network has half of its
planned widths: schedules for CPUs. What is finished is kept, so a table's command can be interrupted and called again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLD = 0
STOCK = "stock"
STOCK_PLANS = "nnUNetStockSmallPlans"
BATCH_SIZE = 2


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        network: registry name, or "stock".
        mode: "scan", a control, or "" for a network without scans.
        mixer: name of a mixer in the place of the network's own blocks, or "".
        variant: of the network.
        teacher: trained folder that it learns from, or "".
    """

    network: str
    mode: str = ""
    mixer: str = ""
    variant: str = "small"
    teacher: str = ""

    @property
    def plans(self) -> str:
        """Identifier of its plans, as ``medmamba plan`` names them."""
        from medmamba.nnunet.names import plans_name
        from medmamba.presets import get_mixer

        if self.network == STOCK:
            return STOCK_PLANS
        mixer = [get_mixer(self.mixer).title] if self.mixer else []
        mode = [] if self.mode in ("", "scan") else [self.mode]
        taught = ["distilled"] if self.teacher else []
        return plans_name(self.network, self.variant.replace("-", "_"), *mixer, *mode, *taught)

    @property
    def label(self) -> str:
        """For files and messages."""
        variant = "" if self.variant == "small" else self.variant
        taught = "taught" if self.teacher else ""
        return "_".join(part for part in (self.network, variant, self.mixer, self.mode or "plain", taught) if part)

    @property
    def arguments(self) -> list[str]:
        """Of ``medmamba plan``."""
        mixer = ["--mixer", self.mixer] if self.mixer else []
        control = ["--ssm-mode", self.mode] if self.mode not in ("", "scan") else []
        teacher = ["--teacher", self.teacher] if self.teacher else []
        return [
            *("--network", self.network, "--variant", self.variant, "--plans-name", self.plans),
            *mixer,
            *control,
            *teacher,
        ]


@dataclass(frozen=True)
class Table:
    """A table's trainings.

    Attributes:
        description: of the command.
        script: its file; trainings are processes of it.
        arms: what is trained, stock first.
        schedule: option of ``medmamba plan`` -> value.
        settings: dataset number -> ``spacing`` in mm or None for the planned one, and ``patch``.
        seeds: one training of every arm for each.
        has_half_stock: half of the stock network's planned widths, else all of them.
    """

    description: str
    script: str
    arms: Sequence[Arm]
    schedule: dict[str, Any]
    settings: dict[int, dict[str, Any]]
    seeds: Sequence[int] = (0, 1)
    has_half_stock: bool = True

    def prepare(self, number: int, dataset: str) -> None:
        """Plans of all arms and preprocessed data."""
        settings = self.settings[number]
        preprocessed = Path(os.environ["nnUNet_preprocessed"]) / dataset
        planning = ["-overwrite_target_spacing", *map(str, settings["spacing"])] if settings["spacing"] else []
        if not (preprocessed / "nnUNetPlans_3d_fullres").is_dir():
            run("nnUNetv2_extract_fingerprint", "-d", str(number), "-np", "1")
            # The first call writes nnUNetPlans.json, the second replaces its spacing.
            run("nnUNetv2_plan_experiment", "-d", str(number), *planning, "-overwrite_plans_name", "nnUNetPlans")
            run("nnUNetv2_preprocess", "-d", str(number), "-c", "3d_fullres", "-np", "1")
        schedule = [word for name, value in self.schedule.items() for word in (f"--{name}", str(value))]
        shape = ["--batch-size", str(BATCH_SIZE), "--patch-size", *map(str, settings["patch"])]
        for arm in self.arms:
            if arm.network == STOCK or (preprocessed / f"{arm.plans}.json").is_file():
                continue
            run("medmamba", "plan", "-d", str(number), "-c", "3d_fullres", *arm.arguments, *shape, *schedule)
        plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
        plans["plans_name"] = STOCK_PLANS
        configuration = plans["configurations"]["3d_fullres"]
        configuration.update(batch_size=BATCH_SIZE, patch_size=list(settings["patch"]))
        arguments = configuration["architecture"]["arch_kwargs"]
        if self.has_half_stock:
            arguments["features_per_stage"] = [width // 2 for width in arguments["features_per_stage"]]
        (preprocessed / f"{STOCK_PLANS}.json").write_text(json.dumps(plans, indent=4))

    def train(self, dataset: str, arm: Arm, seed: int) -> None:
        """Train and validate one arm in this process."""
        import numpy as np
        import torch
        from batchgenerators.utilities.file_and_folder_operations import load_json

        from medmamba.nnunet.names import trainer_name
        from medmamba.nnunet.trainers import TRAINERS

        torch.set_num_threads(1)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
        plans = load_json(str(folder / f"{arm.plans}.json"))
        cls = stock_trainer(self.schedule) if arm.network == STOCK else TRAINERS[trainer_name(arm.network)]
        dataset_json = load_json(str(folder / "dataset.json"))
        trainer = cls({**plans, "continue_training": False}, "3d_fullres", FOLD, dataset_json, torch.device("cpu"))
        trainer.seed, trainer.rehearses = seed, False  # of the stock trainer nobody reads them
        trainer.run_training()
        trainer.inference_allowed_mirroring_axes = None  # one forward per tile instead of eight, for all arms
        trainer.perform_actual_validation(False)

    def missing(self, work: Path, datasets: dict[int, str]) -> Iterator[tuple[str, Arm, int]]:
        """The trainings that have no result yet, all arms of a seed together."""
        for seed in self.seeds:
            for dataset in datasets.values():
                for arm in self.arms:
                    done = (work / "results" / f"seed_{seed}" / dataset).glob(
                        f"*__{arm.plans}__3d_fullres/fold_{FOLD}/validation/summary.json"
                    )
                    if not list(done):
                        yield dataset, arm, seed

    def launch(self, work: Path, dataset: str, arm: Arm, seed: int) -> None:
        """Train one arm in a process of its own."""
        name = f"{dataset}_{arm.label}_seed_{seed}"
        results = work / "results" / f"seed_{seed}"
        results.mkdir(parents=True, exist_ok=True)
        with (work / f"{name}.log").open("w") as log:
            done = subprocess.run(
                [sys.executable, self.script, "--train", dataset, json.dumps(asdict(arm)), str(seed)],
                # Every seed has results of its own, so the teacher lies elsewhere than its plans say.
                env={**os.environ, "nnUNet_results": str(results), "MEDMAMBA_TEACHER": arm.teacher},
                stdout=log,
                stderr=log,
                check=False,
            )
        print(f"{name}: {'done' if done.returncode == 0 else f'FAILED, see {log.name}'}", flush=True)

    def main(self) -> int:
        """The command: all trainings that have no result yet, or with ``--train`` one of them."""
        if sys.argv[1:2] == ["--train"]:
            dataset, arm, seed = sys.argv[2:]
            self.train(dataset, Arm(**json.loads(arm)), int(seed))
            return 0
        parser = argparse.ArgumentParser(description=self.description)
        parser.add_argument("work", type=Path, help="folder for data, plans and results")
        parser.add_argument("raw", type=Path, nargs="+", help="datasets in nnU-Net's raw layout")
        parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time, one core each")
        arguments = parser.parse_args()
        work = arguments.work.resolve()
        for name in ("raw", "preprocessed", "results"):
            (work / name).mkdir(parents=True, exist_ok=True)
            os.environ[f"nnUNet_{name}"] = str(work / name)
        # Augmentation in the training process: the seed decides it, and its time counts.
        os.environ.update(nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1", OMP_NUM_THREADS="1")
        datasets = {int(raw.name[7:10]): raw.resolve().name for raw in arguments.raw}
        for raw in arguments.raw:
            link = work / "raw" / raw.resolve().name
            if not link.exists():
                link.symlink_to(raw.resolve())
            self.prepare(int(raw.name[7:10]), raw.resolve().name)
        os.environ["nnUNet_n_proc_DA"] = "0"
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda each: self.launch(work, *each), list(self.missing(work, datasets))))
        left = list(self.missing(work, datasets))
        print(f"{len(left)} trainings without a result" if left else "all trainings have a result")
        return 1 if left else 0


def stock_trainer(options: dict[str, Any]) -> type:
    """nnU-Net's own trainer with a schedule of ``medmamba plan``: nnU-Net keeps its own in classes."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from medmamba.nnunet import optimisation
    from medmamba.nnunet.schedule import Schedule

    names = {"epochs": "num_epochs", "iterations": "num_iterations_per_epoch", "lr": "initial_lr"}
    names |= {"val-iterations": "num_val_iterations_per_epoch", "warmup-epochs": "warmup_epochs"}
    schedule = Schedule.create(**{names.get(name, name): value for name, value in options.items()})

    class nnUNetTrainerShort(nnUNetTrainer):
        """The stock trainer with the schedule of the others."""

        def initialize(self) -> None:
            self.num_epochs = schedule.num_epochs
            self.num_iterations_per_epoch = schedule.num_iterations_per_epoch
            self.num_val_iterations_per_epoch = schedule.num_val_iterations_per_epoch
            super().initialize()

        def configure_optimizers(self) -> Any:
            return optimisation.configure(self.network, schedule)

    return nnUNetTrainerShort


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
