"""From unlabelled images to a prediction, on real MRIs; training and prediction are processes as a user starts them.

Not stock: a start-up module writes down the network as it is before the first step.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK
import torch

pytestmark = pytest.mark.slow

CASES = ("hippocampus_148", "hippocampus_149", "hippocampus_320", "hippocampus_221")
PLANS = "nnUNetMedMambaVMUNetFinetunedPlans"
TRAINER = "nnUNetTrainerVMUNet_Finetune"

WRITE_DOWN_THE_START = """
import functools, os
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
stock = nnUNetTrainer.on_train_start
@functools.wraps(stock)
def on_train_start(self):
    import torch
    stock(self)
    torch.save(self.network.state_dict(), os.path.join(os.environ["nnUNet_results"], "start.pth"))
nnUNetTrainer.on_train_start = on_train_start
"""


RECIPE = """
network = "vmunet"
modality = "mr"
patch_size = [32, 32, 32]
steps = 2
batch_size = 2
validation_patients = 1

[arguments]
strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
base_features = 8
depths = 1
d_state = 2
"""


@pytest.fixture(scope="module")
def encoder(folder, raw_cases):
    """An encoder after two steps of pretraining on the images of all cases."""
    (folder.root / "recipe.toml").write_text(RECIPE)
    corpus, out = folder.root / "corpus", folder.root / "pretraining"
    ingest = f"{raw_cases / 'imagesTr'} --modality mr --spacing 1.25 --out {corpus} --jobs 1"
    run = f"{folder.root / 'recipe.toml'} --corpus {corpus} --out {out} --device cpu"
    folder.medmamba("pretrain", "ingest", *ingest.split())
    folder.medmamba("pretrain", "run", *run.split())
    return out / "encoder.safetensors"


@pytest.fixture(scope="module")
def planned(folder, raw_cases, encoder):
    """A raw dataset without plans, planned like the encoder and preprocessed by stock nnU-Net."""
    target = folder.raw / raw_cases.name
    (target / "imagesTr").mkdir(parents=True)
    (target / "labelsTr").mkdir()
    for case in CASES:
        shutil.copy(raw_cases / "imagesTr" / f"{case}_0000.nii.gz", target / "imagesTr")
        shutil.copy(raw_cases / "labelsTr" / f"{case}.nii.gz", target / "labelsTr")
    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**dataset_json, "numTraining": len(CASES)}))
    schedule = "--epochs 1 --iterations 2 --val-iterations 1 --batch-size 2 -np 1"
    options = f"-d 4 --like {encoder} --plans-name {PLANS} {schedule}".split()
    printed = folder.medmamba("plan", *options)
    folder.call("nnUNetv2_preprocess", *f"-d 4 -plans_name {PLANS} -c 3d_fullres -np 1".split())
    preprocessed = folder.preprocessed / raw_cases.name
    splits = [{"train": CASES[:3], "val": CASES[3:]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    return SimpleNamespace(printed=printed, folder=preprocessed, init=preprocessed / f"{PLANS}_init.pth", raw=target)


@pytest.fixture(scope="module")
def trained(folder, planned):
    """What the stock command printed, with the trainer for fine-tuning."""
    arguments = f"4 3d_fullres 0 -p {PLANS} -tr {TRAINER} -device cpu -pretrained_weights {planned.init}"
    return folder.run("nnUNetv2_train", *arguments.split(), startup=WRITE_DOWN_THE_START)


def test_the_command_plans_and_tells_what_comes_next(planned):
    assert "planning with nnU-Net" in planned.printed
    assert f"nnUNetv2_preprocess -d 4 -plans_name {PLANS} -c 3d_fullres" in planned.printed
    assert (
        f"medmamba train 4 3d_fullres 0 -p {PLANS} -pretrained_weights {planned.init} -tr {TRAINER}" in planned.printed
    )
    assert "cite: " in planned.printed
    assert "MambaMIM" in planned.printed
    assert (planned.folder / f"{PLANS}_3d_fullres").is_dir()


def test_before_the_first_step_every_tensor_of_the_encoder_is_there(folder, planned, trained, encoder):
    from medmamba.weights import read_encoder

    start = torch.load(folder.results / "start.pth", weights_only=True)
    _, tensors = read_encoder(encoder)
    assert {key for key in start if key.startswith("encoder.")} == {f"encoder.{name}" for name in tensors}
    assert all(torch.equal(start[f"encoder.{name}"], value) for name, value in tensors.items())
    baked = torch.load(planned.init, weights_only=True)["network_weights"]
    assert all(torch.equal(start[key], value) for key, value in baked.items() if ".seg_layers." not in key)
    assert "Validation complete" in trained


def test_stock_nnunet_predicts_in_the_space_of_the_image(folder, planned, trained):
    name = f"{CASES[0]}_0000.nii.gz"
    images, output = folder.root / "to_predict", folder.root / "predicted"
    images.mkdir()
    shutil.copy(planned.raw / "imagesTr" / name, images)
    arguments = f"-d 4 -p {PLANS} -tr {TRAINER} -c 3d_fullres -f 0 -device cpu -npp 0 -nps 0 --disable_tta".split()
    arguments += ["--disable_progress_bar", "-i", str(images), "-o", str(output)]
    folder.run("nnUNetv2_predict", *arguments, trainers="blocked")
    predicted, image = (
        SimpleITK.ReadImage(str(path)) for path in (output / f"{CASES[0]}.nii.gz", planned.raw / "imagesTr" / name)
    )
    assert predicted.GetSize() == image.GetSize()
    assert predicted.GetOrigin() == pytest.approx(image.GetOrigin())
    assert predicted.GetDirection() == pytest.approx(image.GetDirection())
    assert set(np.unique(SimpleITK.GetArrayFromImage(predicted))) <= {0, 1, 2}
