"""``medmamba plan --teacher``: which teacher, how much of it, and whether it fits, go into the plans of a student."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch

from medmamba.cli import main

LABELS = {"background": 0, "a": 1}
DATASET_JSON = {"channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending": ".nii.gz"}
PLAN = ["plan", "-d", "901", "--network", "vmunet", "--variant", "cpu-student"]
NAME = "nnUNetMedMambaVMUNetCpuStudentDistilledPlans"


@pytest.fixture
def teacher(dataset, tmp_path, load_plans):
    """A trained folder whose weights nobody reads, for a dataset with a dataset.json."""
    (dataset / "dataset.json").write_text(json.dumps(DATASET_JSON))
    run = tmp_path / "nnUNet_results" / dataset.name / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    plans = load_plans("isotropic")
    content = {
        "network_weights": {"weight": torch.zeros(1)},
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "plans": plans, "dataset_json": DATASET_JSON},
        "current_epoch": 1,
        "inference_allowed_mirroring_axes": None,
    }
    (run / "fold_0").mkdir(parents=True)
    torch.save(content, run / "fold_0" / "checkpoint_final.pth")
    for name, value in (("plans.json", plans), ("dataset.json", DATASET_JSON)):
        (run / name).write_text(json.dumps(value))
    return run


@pytest.fixture
def assert_refused(capfd):
    """Runs the command and checks that it ends with exit code 2 and one line that holds a message."""

    def check(arguments, message):
        assert main([*PLAN, *map(str, arguments)]) == 2
        error = capfd.readouterr().err.strip().splitlines()
        assert re.search(f"^medmamba plan: .*{message}", error[-1]), error

    return check


def test_a_student_names_its_teacher_and_has_the_configuration_of_it(dataset, teacher, capsys):
    options = ["--distill-weight", "0.25", "--distill-temperature", "3", "--epochs", "7"]
    assert main([*PLAN, "--teacher", str(teacher), *options]) == 0
    plans = json.loads((dataset / f"{NAME}.json").read_text())
    checkpoint = (teacher / "fold_0" / "checkpoint_final.pth").read_bytes()
    assert plans["medmamba"]["distillation"] == {
        "teacher": f"{dataset.name}/{teacher.name}",
        "checkpoint": "checkpoint_final.pth",
        "sha256": {"0": hashlib.sha256(checkpoint).hexdigest()},
        "weight": 0.25,
        "temperature": 3.0,
    }
    assert plans["medmamba"]["schedule"]["num_epochs"] == 7
    assert list(plans["configurations"]) == ["3d_fullres"]
    assert (
        f"teacher: {dataset.name}/{teacher.name}, fold 0, checkpoint_final.pth; weight 0.25" in capsys.readouterr().out
    )


def test_the_same_student_without_a_teacher_has_another_name_and_the_same_network(dataset, teacher):
    assert main([*PLAN, "--teacher", str(teacher)]) == main([*PLAN, "-c", "3d_fullres"]) == 0
    with_teacher, without = (
        json.loads((dataset / f"{name}.json").read_text()) for name in (NAME, NAME.replace("Distilled", ""))
    )
    assert with_teacher["configurations"] == without["configurations"]
    assert "distillation" not in without["medmamba"]


def test_a_configuration_that_the_teacher_cannot_read_is_refused(teacher, assert_refused, dataset):
    assert_refused(["--teacher", teacher, "-c", "2d"], "the teacher .* for 2d has axes 3, the student 2")
    assert not (dataset / f"{NAME}.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distill-weight", "2"], "weight is 2.0; expected a number from 0 to 1"),
        (["--distill-temperature", "0"], "temperature is 0.0; expected a number above 0"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options, message, teacher, assert_refused):
    assert_refused(["--teacher", teacher, *options], message)


def test_values_without_a_teacher_are_refused(dataset, assert_refused):
    assert_refused(["--distill-weight", "0.5"], "--distill-weight is for a student; name its teacher")


def test_other_labels_are_refused(dataset, teacher, assert_refused):
    other = {**DATASET_JSON, "labels": {**LABELS, "b": 2}}
    (dataset / "dataset.json").write_text(json.dumps(other))
    assert_refused(["--teacher", teacher], "has labels")


def test_a_folder_without_a_training_is_refused(dataset, tmp_path, assert_refused):
    assert_refused(["--teacher", tmp_path], "is no trained folder of nnU-Net")


def test_an_encoder_and_a_teacher_are_too_much(dataset, teacher, assert_refused, tmp_path):
    assert_refused(["--teacher", teacher, "--like", tmp_path], "leave one out")
