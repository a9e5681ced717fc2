"""Console commands of nnU-Net around a training of ours: continue, validate, compare, ensemble, export, install.

The interrupted training and the prediction of the receiver are processes. The other commands run here, through the
same entry points, with threads in place of the processes that they spawn.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK
import torch

from medmamba.nnunet.optimisation import learning_rate
from medmamba.nnunet.schedule import Schedule

pytestmark = pytest.mark.slow

DATASET = "Dataset901_Isotropic"
TRAINER = "nnUNetTrainerVMUNet"
FIRST, SECOND = "nnUNetMedMambaVMUNetPlans", "nnUNetMedMambaVMUNetTunedPlans"
VALIDATED, PREDICTED = "hippocampus_320", "hippocampus_148"
EPOCHS, ITERATIONS = 4, 2


@pytest.fixture(scope="module")
def prepared(folder, raw_cases, load_plans, make_tiny):
    """The dataset with two plans: for a training from scratch, and to fine-tune its result with hardly any step."""
    stock = load_plans("isotropic")
    stock["configurations"]["3d_fullres"]["batch_size"] = 2
    first, second = make_tiny(stock), make_tiny(stock)
    first["medmamba"]["schedule"] |= {"optimizer": "AdamW", "num_epochs": EPOCHS, "save_every": 1}
    second["medmamba"]["schedule"] |= {"initial_lr": 1e-12, "num_iterations_per_epoch": 1}
    second["plans_name"] = SECOND
    folder.add_dataset(raw_cases, [first, second])
    folder.images(raw_cases, PREDICTED)
    return SimpleNamespace(first=first)


def train(plans: str) -> list[str]:
    return f"901 3d_fullres 0 -p {plans} -tr {TRAINER} -device cpu".split()


def model(folder, plans: str) -> Path:
    return folder.results / DATASET / f"{TRAINER}__{plans}__3d_fullres"


def load(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


@pytest.fixture(scope="module")
def interrupted(folder, prepared):
    """What a training left that was killed when its first checkpoint was complete."""
    process = folder.start("nnUNetv2_train", *train(FIRST))
    latest = model(folder, FIRST) / "fold_0" / "checkpoint_latest.pth"
    deadline = time.monotonic() + 300
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    printed, _ = process.communicate()
    assert latest.exists(), printed
    assert not (latest.parent / "checkpoint_final.pth").exists(), "it finished before it could be killed"
    return load(latest)


@pytest.fixture(scope="module")
def continued(folder, interrupted):
    """The first model, continued to its end with ``--c --npz``."""
    path = model(folder, FIRST)
    logs = set((path / "fold_0").glob("training_log*.txt"))
    folder.call("nnUNetv2_train", *train(FIRST), "--c", "--npz")
    (log,) = set((path / "fold_0").glob("training_log*.txt")) - logs
    return SimpleNamespace(folder=path, log=log.read_text())


@pytest.fixture(scope="module")
def tuned(folder, continued):
    """The second model, trained from the weights of the first."""
    weights = continued.folder / "fold_0" / "checkpoint_final.pth"
    folder.call("nnUNetv2_train", *train(SECOND), "--npz", "-pretrained_weights", weights)
    return model(folder, SECOND)


@pytest.fixture(scope="module")
def compared(folder, continued, tuned):
    """The result of ``nnUNetv2_find_best_configuration`` for both models."""
    arguments = f"901 -p {FIRST} {SECOND} -tr {TRAINER} -c 3d_fullres -f 0 -np 1".split()
    folder.call("nnUNetv2_find_best_configuration", *arguments)
    return json.loads((folder.results / DATASET / "inference_information.json").read_text())


@pytest.fixture(scope="module")
def predictions(folder, continued, tuned):
    """Predictions of one image by both models, with probabilities."""
    outputs = []
    for plans in (FIRST, SECOND):
        outputs.append(folder.root / f"predicted_{plans}")
        folder.call("nnUNetv2_predict", *predict(plans, outputs[-1]), "--save_probabilities")
    return outputs


def predict(plans: str, output: Path) -> list[object]:
    options = f"-d 901 -p {plans} -tr {TRAINER} -c 3d_fullres -f 0 -device cpu -npp 0 -nps 0 --disable_tta -i images -o"
    return [*options.split(), output]


def test_a_killed_training_continues_where_it_was(interrupted, continued, prepared):
    epochs = interrupted["current_epoch"]
    assert 1 <= epochs < EPOCHS
    assert f"Epoch {epochs}" in continued.log
    assert f"Epoch {epochs - 1}" not in continued.log
    final = load(continued.folder / "fold_0" / "checkpoint_final.pth")
    schedule = Schedule.from_plans(prepared.first)
    assert final["logging"]["lrs"] == pytest.approx([learning_rate(epoch, schedule) for epoch in range(EPOCHS)])
    assert final["logging"]["train_losses"][:epochs] == interrupted["logging"]["train_losses"]
    # AdamW counts its steps: those before the kill are among them only if its state was restored.
    assert {int(state["step"]) for state in final["optimizer_state"]["state"].values()} == {EPOCHS * ITERATIONS}


def test_validation_writes_readable_probabilities(continued):
    validation = continued.folder / "fold_0" / "validation"
    probabilities = np.load(validation / f"{VALIDATED}.npz")["probabilities"]
    assert probabilities.shape[0] == 3
    assert np.allclose(probabilities.sum(0), 1, atol=1e-2)
    assert np.array_equal(probabilities.argmax(0), array(validation / f"{VALIDATED}.nii.gz"))


def test_validation_repeats_with_the_final_and_the_best_checkpoint(folder, continued):
    fold = continued.folder / "fold_0"
    segmentation = fold / "validation" / f"{VALIDATED}.nii.gz"
    before, summary = array(segmentation), (fold / "validation" / "summary.json").read_text()
    best = load(fold / "checkpoint_best.pth")
    heads = [key for key in best["network_weights"] if key.endswith("seg_layers.0.bias")]
    for key in heads:
        best["network_weights"][key] += torch.tensor([0.0, 0.0, 1e3])
    torch.save(best, fold / "checkpoint_best.pth")
    folder.call("nnUNetv2_train", *train(FIRST), "--val", "--val_best")
    assert np.all(array(segmentation) == 2)
    folder.call("nnUNetv2_train", *train(FIRST), "--val", "--npz")
    assert np.array_equal(array(segmentation), before)
    assert json.loads((fold / "validation" / "summary.json").read_text()) == json.loads(summary)


def test_pretrained_weights_of_ours_are_where_a_training_starts(continued, tuned):
    source, target = (load(path / "fold_0" / "checkpoint_final.pth") for path in (continued.folder, tuned))
    for key, weight in source["network_weights"].items():
        is_same = torch.allclose(weight, target["network_weights"][key], atol=1e-6)
        assert is_same == (".seg_layers." not in key), key


def test_the_best_configuration_is_found_with_its_ensemble_and_postprocessing(folder, compared):
    single = {f"{TRAINER}__{plans}__3d_fullres" for plans in (FIRST, SECOND)}
    scores = compared["all_results"]
    assert single < set(scores)
    (ensemble,) = set(scores) - single
    assert all(0 <= score <= 1 for score in scores.values())
    assert compared["best_model_or_ensemble"]["result_on_crossval_pre_pp"] == max(scores.values())
    assert Path(compared["best_model_or_ensemble"]["postprocessing_file"]).is_file()
    average = np.mean([validation_probabilities(folder, plans) for plans in (FIRST, SECOND)], axis=0)
    merged = array(folder.results / DATASET / "ensembles" / ensemble / f"{VALIDATED}.nii.gz")
    assert np.array_equal(average.argmax(0), merged)


def validation_probabilities(folder, plans: str) -> np.ndarray:
    path = model(folder, plans) / "fold_0" / "validation" / f"{VALIDATED}.npz"
    return np.load(path)["probabilities"].astype(np.float32)


def test_predictions_are_ensembled_and_postprocessed(folder, compared, predictions):
    merged, processed = folder.root / "merged", folder.root / "processed"
    folder.call("nnUNetv2_ensemble", "-i", *predictions, "-o", merged, "-np", 1)
    name = f"{PREDICTED}.nii.gz"
    average = np.mean([np.load(path / f"{PREDICTED}.npz")["probabilities"] for path in predictions], axis=0)
    assert np.array_equal(average.argmax(0), array(merged / name))
    best = compared["best_model_or_ensemble"]
    rule = ["-pp_pkl_file", best["postprocessing_file"], "-plans_json", best["some_plans_file"]]
    folder.call("nnUNetv2_apply_postprocessing", "-i", merged, "-o", processed, *rule, "-np", 1)
    assert set(np.unique(array(processed / name))) <= set(np.unique(array(merged / name)))


def test_an_exported_model_predicts_the_same_where_our_trainers_are_not(folder, compared, predictions):
    archive = folder.root / "model.zip"
    options = f"-d 901 -c 3d_fullres -f 0 -tr {TRAINER} -p {FIRST} -o".split()
    folder.call("nnUNetv2_export_model_to_zip", *options, archive)
    receiver = type(folder)(folder.root / "receiver")
    receiver.call("nnUNetv2_install_pretrained_model_from_zip", archive)
    shutil.copytree(folder.root / "images", receiver.root / "images")
    output = receiver.root / "predicted"
    receiver.run("nnUNetv2_predict", *predict(FIRST, output), "--save_probabilities", trainers="blocked")
    name = f"{PREDICTED}.nii.gz"
    assert np.array_equal(array(output / name), array(predictions[0] / name))
    first, second = (np.load(path / f"{PREDICTED}.npz")["probabilities"] for path in (output, predictions[0]))
    assert np.array_equal(first, second)
