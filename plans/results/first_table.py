"""The first table: every network with its scan and without it, beside the stock network, on two datasets.

    python plans/results/first_table.py WORK_FOLDER RAW_DATASET_FOLDER... [--jobs 2]

Each folder is a dataset in nnU-Net's raw layout. All arms of a dataset share data, fold, patch, batch size, optimizer,
learning rate and number of iterations (see ``SETTINGS``), and are trained once per seed; only the network differs. The
networks are the ``small`` variants, the stock network has half of its planned widths: this is a schedule for CPUs.
What is finished is kept, so the command can be interrupted and called again. Collect with::

    medmamba collect WORK_FOLDER/results/*/DatasetXXX_Name --out table.csv
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEEDS = (0, 1)
FOLD = 0
STOCK_PLANS = "nnUNetStockSmallPlans"
SCHEDULE = {"epochs": 10, "iterations": 25, "val-iterations": 1, "warmup-epochs": 1, "optimizer": "AdamW", "lr": 3e-3}
#: Dataset number -> target spacing in mm and patch. A CPU has no time for the planned ones of 101 (4 x 2.5 x 4 mm,
#: 80x128x128); its labels are scored at their own spacing all the same.
SETTINGS: dict[int, dict[str, Any]] = {
    4: {"spacing": None, "patch": (40, 56, 40)},
    101: {"spacing": (5, 5, 5), "patch": (32, 48, 64)},
}
BATCH_SIZE = 2


def arms() -> list[tuple[str, str]]:
    """(network, ssm_mode) of every arm; the stock network is ("stock", "")."""
    from medmamba.networks import NETWORKS

    ours = [(name, mode) for name in NETWORKS for mode in modes(name)]
    return [("stock", ""), *ours]


def modes(network: str) -> list[str]:
    from medmamba.networks import get_spec

    return ["scan", "identity"] if get_spec(network).has_scans else [""]


def plans_of(network: str, mode: str) -> str:
    from medmamba.nnunet.names import plans_name

    if network == "stock":
        return STOCK_PLANS
    return plans_name(network, "small", *([] if mode in ("", "scan") else [mode]))


def prepare(number: int, dataset: str) -> None:
    """Plans of all arms and preprocessed data."""
    settings = SETTINGS[number]
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / dataset
    planning = ["-overwrite_target_spacing", *map(str, settings["spacing"])] if settings["spacing"] else []
    if not (preprocessed / "nnUNetPlans_3d_fullres").is_dir():
        run("nnUNetv2_extract_fingerprint", "-d", str(number), "-np", "1")
        # The first call writes nnUNetPlans.json, the second replaces its spacing.
        run("nnUNetv2_plan_experiment", "-d", str(number), *planning, "-overwrite_plans_name", "nnUNetPlans")
        run("nnUNetv2_preprocess", "-d", str(number), "-c", "3d_fullres", "-np", "1")
    schedule = [word for name, value in SCHEDULE.items() for word in (f"--{name}", str(value))]
    shape = ["--batch-size", str(BATCH_SIZE), "--patch-size", *map(str, settings["patch"])]
    for network, mode in arms()[1:]:
        if (preprocessed / f"{plans_of(network, mode)}.json").is_file():
            continue
        control = ["--ssm-mode", mode] if mode not in ("", "scan") else []
        options = f"-d {number} --network {network} --variant small -c 3d_fullres".split()
        run("medmamba", "plan", *options, *control, *shape, *schedule)
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = STOCK_PLANS
    configuration = plans["configurations"]["3d_fullres"]
    configuration.update(batch_size=BATCH_SIZE, patch_size=list(settings["patch"]))
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [width // 2 for width in arguments["features_per_stage"]]
    (preprocessed / f"{STOCK_PLANS}.json").write_text(json.dumps(plans, indent=4))


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def train(dataset: str, network: str, mode: str, seed: int) -> None:
    """Train and validate one arm in this process."""
    import numpy as np
    import torch
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from medmamba.nnunet import optimisation
    from medmamba.nnunet.names import trainer_name
    from medmamba.nnunet.schedule import Schedule
    from medmamba.nnunet.trainers import TRAINERS

    class nnUNetTrainerShort(nnUNetTrainer):
        """The stock trainer with the same schedule: nnU-Net keeps its own in classes."""

        def initialize(self) -> None:
            schedule = stock_schedule()
            self.num_epochs = schedule.num_epochs
            self.num_iterations_per_epoch = schedule.num_iterations_per_epoch
            self.num_val_iterations_per_epoch = schedule.num_val_iterations_per_epoch
            super().initialize()

        def configure_optimizers(self) -> Any:
            return optimisation.configure(self.network, stock_schedule())

    def stock_schedule() -> Schedule:
        names = {"epochs": "num_epochs", "iterations": "num_iterations_per_epoch", "lr": "initial_lr"}
        names |= {"val-iterations": "num_val_iterations_per_epoch", "warmup-epochs": "warmup_epochs"}
        return Schedule.create(**{names.get(name, name): value for name, value in SCHEDULE.items()})

    torch.set_num_threads(1)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
    plans = load_json(str(folder / f"{plans_of(network, mode)}.json"))
    cls = nnUNetTrainerShort if network == "stock" else TRAINERS[trainer_name(network)]
    dataset_json = load_json(str(folder / "dataset.json"))
    trainer = cls({**plans, "continue_training": False}, "3d_fullres", FOLD, dataset_json, torch.device("cpu"))
    trainer.seed, trainer.rehearses = seed, False  # of the stock trainer nobody reads them
    trainer.run_training()
    trainer.inference_allowed_mirroring_axes = None  # one forward per tile instead of eight, for all arms
    trainer.perform_actual_validation(False)


def missing(work: Path, datasets: dict[int, str]) -> Iterator[tuple[int, str, str, str, int]]:
    """The trainings that have no result yet, all arms of a seed together."""
    for seed in SEEDS:
        for number, dataset in datasets.items():
            for network, mode in arms():
                done = (work / "results" / f"seed_{seed}" / dataset).glob(
                    f"*__{plans_of(network, mode)}__3d_fullres/fold_{FOLD}/validation/summary.json"
                )
                if not list(done):
                    yield number, dataset, network, mode, seed


def launch(work: Path, dataset: str, network: str, mode: str, seed: int) -> None:
    """Train one arm in a process of its own."""
    name = f"{dataset}_{network}_{mode or 'plain'}_seed_{seed}"
    results = work / "results" / f"seed_{seed}"
    results.mkdir(parents=True, exist_ok=True)
    with (work / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, __file__, "--train", dataset, network, mode, str(seed)],
            env={**os.environ, "nnUNet_results": str(results)},
            stdout=log,
            stderr=log,
            check=False,
        )
    print(f"{name}: {'done' if done.returncode == 0 else f'FAILED, see {log.name}'}", flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--train"]:
        dataset, network, mode, seed = sys.argv[2:]
        train(dataset, network, mode, int(seed))
        return 0
    parser = argparse.ArgumentParser(description="Train every arm of the first table.")
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
        prepare(int(raw.name[7:10]), raw.resolve().name)
    os.environ["nnUNet_n_proc_DA"] = "0"
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda arm: launch(work, *arm[1:]), list(missing(work, datasets))))
    left = list(missing(work, datasets))
    print(f"{len(left)} trainings without a result" if left else "all trainings have a result")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
