"""Stock console commands on real MRIs: with our trainer's name, and with our plans alone.

What is stock here: training and prediction, their processes, and in the second case the trainer class. What is not: the
stock trainer's 1000 epochs of 250 iterations are hard-wired, so a start-up module lowers these three numbers; and the
dataset is planned in this process, as docs/getting-started/your-dataset.md does it with processes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

CASES = ("hippocampus_148", "hippocampus_149", "hippocampus_320", "hippocampus_221")
PLANS = "nnUNetMedMambaVMUNetSmallPlans"

SHORT_STOCK_TRAINING = """
import functools
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
stock = nnUNetTrainer.__init__
@functools.wraps(stock)
def init(self, *arguments, **options):
    stock(self, *arguments, **options)
    self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
nnUNetTrainer.__init__ = init
"""


@pytest.fixture(scope="module")
def planned(folder, raw_cases):
    """Four cases, preprocessed by stock nnU-Net, with our plans for a short training on whole volumes."""
    target = folder.raw / raw_cases.name
    (target / "imagesTr").mkdir(parents=True)
    (target / "labelsTr").mkdir()
    for case in CASES:
        shutil.copy(raw_cases / "imagesTr" / f"{case}_0000.nii.gz", target / "imagesTr")
        shutil.copy(raw_cases / "labelsTr" / f"{case}.nii.gz", target / "labelsTr")
    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**dataset_json, "numTraining": len(CASES)}))
    options = "-d 4 -c 3d_fullres -npfp 1 -np 1 --verify_dataset_integrity"
    folder.call("nnUNetv2_plan_and_preprocess", *options.split())
    (folder.preprocessed / raw_cases.name / "splits_final.json").write_text(
        json.dumps([{"train": CASES[:3], "val": CASES[3:]}])
    )
    schedule = "--epochs 1 --iterations 2 --val-iterations 1 --batch-size 2"
    options = f"-d 4 --network vmunet --variant small -c 3d_fullres {schedule}".split()
    assert "nnUNetv2_preprocess" not in folder.medmamba("plan", *options)


@pytest.mark.slow
def test_the_prediction_cannot_import_our_trainers(folder):
    with pytest.raises(AssertionError, match=r"medmamba\.nnunet is blocked"):
        folder.run(sys.executable, "-c", "import medmamba.nnunet", trainers="blocked")


def predict(folder, trainer: str) -> Path:
    """Predict one image with stock nnU-Net where our trainers cannot be imported."""
    images, output = folder.root / f"images_{trainer}", folder.root / f"predicted_{trainer}"
    images.mkdir()
    shutil.copy(folder.raw / "Dataset004_Hippocampus" / "imagesTr" / f"{CASES[0]}_0000.nii.gz", images)
    arguments = f"-d 4 -p {PLANS} -tr {trainer} -c 3d_fullres -f 0 -device cpu -npp 0 -nps 0 --disable_tta".split()
    arguments += ["--disable_progress_bar", "-i", str(images), "-o", str(output)]
    folder.run("nnUNetv2_predict", *arguments, trainers="blocked")
    return output / f"{CASES[0]}.nii.gz"


def assert_segmentation(path: Path, like: Path) -> None:
    import SimpleITK

    predicted, image = (SimpleITK.ReadImage(str(p)) for p in (path, like))
    assert predicted.GetSize() == image.GetSize()
    assert predicted.GetSpacing() == pytest.approx(image.GetSpacing())
    assert set(np.unique(SimpleITK.GetArrayFromImage(predicted))) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("trainer", "startup"),
    [
        # What docs/getting-started/your-dataset.md does, and its test runs with every other slow one.
        pytest.param("nnUNetTrainerVMUNet", None, id="our trainer by name", marks=pytest.mark.nightly),
        pytest.param("nnUNetTrainer", SHORT_STOCK_TRAINING, id="our plans alone", marks=pytest.mark.slow),
    ],
)
def test_stock_commands_train_and_predict(trainer, startup, planned, folder):
    printed = folder.run(
        "nnUNetv2_train",
        *f"4 3d_fullres 0 -p {PLANS} -tr {trainer} -device cpu".split(),
        startup=startup,
        trainers="unknown" if trainer == "nnUNetTrainer" else "found",
    )
    assert "Validation complete" in printed
    model = folder.results / "Dataset004_Hippocampus" / f"{trainer}__{PLANS}__3d_fullres"
    plans = json.loads((model / "plans.json").read_text())
    assert plans["medmamba"]["network"] == "vmunet"
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    image = folder.raw / "Dataset004_Hippocampus" / "imagesTr" / f"{CASES[0]}_0000.nii.gz"
    assert_segmentation(predict(folder, trainer), image)
