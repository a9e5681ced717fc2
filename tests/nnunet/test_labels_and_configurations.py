"""Regions, the ignore label, 2d and the cascade: trained, validated and predicted through nnU-Net's entry points."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from medmamba.command import CommandError
from medmamba.nnunet.preflight import check_training

DATASET = "Dataset901_Isotropic"
TRAINER = "nnUNetTrainerVMUNet"
PLANS = "nnUNetMedMambaVMUNetPlans"
CASES = ("hippocampus_148", "hippocampus_149", "hippocampus_320")
REGIONS = {"background": 0, "hippocampus": [1, 2], "posterior": 2}
IGNORED = {"background": 0, "anterior": 1, "posterior": 2, "ignore": 3}
#: Case -> labels and regions_class_order of dataset.json, heads of the network, keys in the summary of a validation.
LABELS = {
    "regions": (REGIONS, [1, 2], 2, {"(1, 2)", "2"}),
    "ignore": (IGNORED, None, 3, {"1", "2"}),
    "regions and ignore": ({**REGIONS, "ignore": 3}, [1, 2], 2, {"(1, 2)", "2"}),
}


@pytest.fixture
def folder(make_folder):
    return make_folder()


@pytest.fixture
def dataset_json(raw_cases):
    return json.loads((raw_cases / "dataset.json").read_text())


@pytest.fixture
def plans(load_plans, make_tiny):
    """Tiny plans in which a patch is a whole volume."""
    stock = load_plans("isotropic")
    stock["configurations"]["3d_fullres"].update(patch_size=[40, 56, 40], batch_size=2)
    stock["configurations"]["2d"].update(patch_size=[56, 40], batch_size=2)
    return make_tiny(stock)


def train(folder, configuration: str, fold: object = 0) -> Path:
    """Train one epoch and validate; returns the folder of the fold."""
    folder.call("nnUNetv2_train", 901, configuration, fold, *f"-p {PLANS} -tr {TRAINER} -device cpu --npz".split())
    return folder.results / DATASET / f"{TRAINER}__{PLANS}__{configuration}" / f"fold_{fold}"


def predict(folder, configuration: str, fold: object = 0, *options: object) -> Path:
    """Predict the folder of images, with probabilities."""
    output = folder.root / f"predicted_{configuration}"
    model = f"-d 901 -p {PLANS} -tr {TRAINER} -c {configuration} -f {fold} -device cpu -npp 0 -nps 0 --disable_tta"
    folder.call("nnUNetv2_predict", *model.split(), "-i", "images", "-o", output, "--save_probabilities", *options)
    return output


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def weights(fold: Path) -> dict[str, torch.Tensor]:
    return torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]


def summary(fold: Path) -> dict:
    return json.loads((fold / "validation" / "summary.json").read_text())


def with_an_ignored_slab(raw: Path, target: Path) -> Path:
    """A copy of the raw cases in which the first ten slices are not labelled."""
    shutil.copytree(raw, target)
    for path in (target / "labelsTr").iterdir():
        image = SimpleITK.ReadImage(str(path))
        image[:, :, :10] = 3
        SimpleITK.WriteImage(image, str(path))
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_trained_validated_and_predicted(kind, folder, plans, dataset_json, raw_cases):
    labels, order, heads, reported = LABELS[kind]
    raw = with_an_ignored_slab(raw_cases, folder.root / "cases") if "ignore" in labels else raw_cases
    dataset_json = {**dataset_json, "labels": labels, **({} if order is None else {"regions_class_order": order})}
    folder.add_dataset(raw, [plans], dataset_json)
    fold = train(folder, "3d_fullres")
    assert weights(fold)["decoder.seg_layers.0.weight"].shape[0] == heads
    assert set(summary(fold)["mean"]) == reported
    if "ignore" in labels:
        reference = array(raw / "labelsTr" / f"{CASES[2]}.nii.gz")
        counted = summary(fold)["metric_per_case"][0]["metrics"]["2"]
        assert sum(counted[key] for key in ("TP", "FP", "FN", "TN")) == (reference != 3).sum()
    folder.images(raw, CASES[0])
    output = predict(folder, "3d_fullres")
    segmentation = array(output / f"{CASES[0]}.nii.gz")
    probabilities = np.load(output / f"{CASES[0]}.npz")["probabilities"]
    assert probabilities.shape == (heads, *segmentation.shape)
    expected = probabilities.argmax(0)
    if order is not None:
        expected = np.zeros_like(segmentation)
        for label, probability in zip(order, probabilities, strict=True):
            expected[probability > 0.5] = label
    assert np.array_equal(segmentation, expected)


def test_ignored_voxels_have_no_part_in_the_loss(make_trainer, tiny_plans, dataset_json):
    trainer = make_trainer(TRAINER, tiny_plans, dataset_json={**dataset_json, "labels": IGNORED})
    trainer.initialize()
    target = torch.zeros(1, 1, 16, 16, 16)
    target[:, :, :8] = 3
    targets = [target[:, :, ::step, ::step, ::step] for step in (1, 2, 4)]
    outputs = [torch.randn(1, 3, *t.shape[2:]) for t in targets]
    expected = trainer.loss(outputs, targets)
    for output, factor in zip(outputs, (1, 2, 4), strict=True):
        output[:, :, : 8 // factor] += 5 * torch.randn_like(output[:, :, : 8 // factor])
    assert torch.equal(trainer.loss(outputs, targets), expected)
    outputs[0][:, :, 8:] += torch.randn_like(outputs[0][:, :, 8:])
    assert not torch.equal(trainer.loss(outputs, targets), expected)


@pytest.mark.slow
def test_a_2d_configuration_is_trained_validated_and_predicted(folder, plans, raw_cases):
    folder.add_dataset(raw_cases, [plans], configurations=("2d",))
    fold = train(folder, "2d")
    assert weights(fold)["decoder.seg_layers.0.weight"].dim() == 4
    assert 0 <= summary(fold)["foreground_mean"]["Dice"] <= 1
    folder.images(raw_cases, CASES[0])
    reference = array(raw_cases / "labelsTr" / f"{CASES[0]}.nii.gz")
    assert array(predict(folder, "2d") / f"{CASES[0]}.nii.gz").shape == reference.shape


@pytest.mark.slow
def test_a_cascade_is_trained_validated_and_predicted(folder, load_plans, make_tiny, raw_cases, monkeypatch):
    stock = load_plans("isotropic")
    full = stock["configurations"]["3d_fullres"]
    full.update(patch_size=[40, 56, 40], batch_size=2)
    low = {**full, "data_identifier": "nnUNetPlans_3d_lowres", "patch_size": [24, 40, 24], "spacing": [1.5, 1.5, 1.5]}
    stock["configurations"]["3d_lowres"] = {**low, "next_stage": "3d_cascade_fullres"}
    stock["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    folder.add_dataset(raw_cases, [make_tiny(stock)], configurations=("3d_lowres", "3d_fullres"))
    for name, value in folder.variables().items():
        monkeypatch.setenv(name, value)
    arguments = f"901 3d_cascade_fullres all -p {PLANS} -tr {TRAINER} -device cpu".split()
    with pytest.raises(CommandError, match="lacks 3 of 3 cases"):
        check_training(arguments)
    # A stage trains on what the stage before it predicted in validation, so that one has to validate every case.
    first = train(folder, "3d_lowres", "all")
    assert check_training(arguments) == arguments
    second = train(folder, "3d_cascade_fullres", "all")
    inputs = [next(w.shape[1] for w in weights(fold).values() if w.dim() == 5) for fold in (first, second)]
    assert inputs == [1, 3]
    assert 0 <= summary(second)["foreground_mean"]["Dice"] <= 1
    folder.images(raw_cases, CASES[0])
    coarse = predict(folder, "3d_lowres", "all")
    output = predict(folder, "3d_cascade_fullres", "all", "-prev_stage_predictions", coarse)
    assert array(output / f"{CASES[0]}.nii.gz").shape == array(coarse / f"{CASES[0]}.nii.gz").shape
