"""Stock console commands on real MRIs: with our trainer's name, and with our plans alone.

What is stock here: every command, its process, and in the second case the trainer class. What is not: the stock
trainer's 1000 epochs of 250 iterations are hard-wired, so a start-up module lowers these three numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

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

# Loaded by every Python of the prediction, its child processes too.
BLOCKED_TRAINERS = """
import sys
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(("medmamba.nnunet", "medmamba_plans", "medmamba_trainers")):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker)
"""


class Folder:
    """nnU-Net's folders and a way to run commands on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw, self.preprocessed, self.results = (root / name for name in ("raw", "preprocessed", "results"))
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir()

    def run(self, *command: str, startup: str | None = None, trainers: bool = False) -> str:
        """Run a command and return what it printed; ``startup`` is code that each of its Pythons runs first."""
        environment = {
            **os.environ,
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "1" if "plan" in command[0] else "0",
        }
        environment.pop("nnUNet_extTrainer", None)
        if trainers:
            environment["nnUNet_extTrainer"] = str(Path(_trainers_folder()))
        if startup is not None:
            hook = self.root / f"startup{len(list(self.root.glob('startup*')))}"
            hook.mkdir()
            (hook / "sitecustomize.py").write_text(startup)
            environment["PYTHONPATH"] = os.pathsep.join([str(hook), *sys.path])
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, cwd=self.root, check=False
        )
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
        return result.stdout + result.stderr

    def predict(self, trainer: str) -> Path:
        """Predict one image with stock nnU-Net where our trainers cannot be imported."""
        images, output = self.root / f"images_{trainer}", self.root / f"predicted_{trainer}"
        images.mkdir()
        dataset = "Dataset004_Hippocampus"
        shutil.copy(self.raw / dataset / "imagesTr" / f"{CASES[0]}_0000.nii.gz", images)
        arguments = f"-d 4 -p {PLANS} -tr {trainer} -c 3d_fullres -f 0 -device cpu -npp 1 -nps 1 --disable_tta".split()
        arguments += ["--disable_progress_bar", "-i", str(images), "-o", str(output)]
        self.run(_script("nnUNetv2_predict"), *arguments, startup=BLOCKED_TRAINERS)
        return output / f"{CASES[0]}.nii.gz"


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def _trainers_folder() -> str:
    code = "import os; from medmamba.nnunet.names import trainers_folder; print(trainers_folder())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, raw_cases) -> Folder:
    """Four cases, preprocessed by stock nnU-Net, with our plans for a short training on whole volumes."""
    folder = Folder(tmp_path_factory.mktemp("nnunet"))
    target = folder.raw / raw_cases.name
    (target / "imagesTr").mkdir(parents=True)
    (target / "labelsTr").mkdir()
    for case in CASES:
        shutil.copy(raw_cases / "imagesTr" / f"{case}_0000.nii.gz", target / "imagesTr")
        shutil.copy(raw_cases / "labelsTr" / f"{case}.nii.gz", target / "labelsTr")
    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**dataset_json, "numTraining": len(CASES)}))
    options = "-d 4 -c 3d_fullres -npfp 1 -np 1 --verify_dataset_integrity"
    folder.run(_script("nnUNetv2_plan_and_preprocess"), *options.split())
    (folder.preprocessed / raw_cases.name / "splits_final.json").write_text(
        json.dumps([{"train": CASES[:3], "val": CASES[3:]}])
    )
    schedule = "--epochs 1 --iterations 2 --val-iterations 1 --batch-size 2"
    options = f"-d 4 --network vmunet --variant small -c 3d_fullres {schedule}".split()
    printed = folder.run(sys.executable, "-m", "medmamba.cli", "plan", *options)
    assert "nnUNetv2_preprocess" not in printed
    return folder


def test_the_prediction_cannot_import_our_trainers(folder):
    with pytest.raises(AssertionError, match=r"medmamba\.nnunet is blocked"):
        folder.run(sys.executable, "-c", "import medmamba.nnunet", startup=BLOCKED_TRAINERS)


def assert_segmentation(path: Path, like: Path) -> None:
    import SimpleITK

    predicted, image = (SimpleITK.ReadImage(str(p)) for p in (path, like))
    assert predicted.GetSize() == image.GetSize()
    assert predicted.GetSpacing() == pytest.approx(image.GetSpacing())
    assert set(np.unique(SimpleITK.GetArrayFromImage(predicted))) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("trainer", "startup"),
    [("nnUNetTrainerVMUNet", None), ("nnUNetTrainer", SHORT_STOCK_TRAINING)],
    ids=["our trainer by name", "our plans alone"],
)
def test_stock_commands_train_and_predict(trainer, startup, folder):
    printed = folder.run(
        _script("nnUNetv2_train"),
        *f"4 3d_fullres 0 -p {PLANS} -tr {trainer} -device cpu".split(),
        startup=startup,
        trainers=trainer != "nnUNetTrainer",
    )
    assert "Validation complete" in printed
    model = folder.results / "Dataset004_Hippocampus" / f"{trainer}__{PLANS}__3d_fullres"
    plans = json.loads((model / "plans.json").read_text())
    assert plans["medmamba"]["network"] == "vmunet"
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    image = folder.raw / "Dataset004_Hippocampus" / "imagesTr" / f"{CASES[0]}_0000.nii.gz"
    assert_segmentation(folder.predict(trainer), image)
