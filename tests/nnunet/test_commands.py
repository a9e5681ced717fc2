"""``medmamba env | run | train | predict`` as a user meets them: one line for bad input, nnU-Net for the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from medmamba.cli import main
from medmamba.command import CommandError
from medmamba.networks import NETWORKS
from medmamba.nnunet import host, preflight
from medmamba.nnunet.errors import UserFacingError
from medmamba.nnunet.names import EXT_TRAINER, TRAINER_NAMES_IN_WORDS, trainers_folder

DATASET = "Dataset901_Isotropic"
PLANS = "nnUNetMedMambaVMUNetPlans"


@pytest.fixture
def planned(folders, tiny_plans, stock_plans):
    """Folders with stock plans and ours."""
    target = folders / "nnUNet_preprocessed" / DATASET
    for plans in (stock_plans, tiny_plans):
        (target / f"{plans['plans_name']}.json").write_text(json.dumps(plans))
    return folders


@pytest.fixture
def trained(planned):
    """Folders with a model that was "trained" by two trainers, and images to predict."""
    for trainer, plans in [
        ("nnUNetTrainer", PLANS),
        ("nnUNetTrainer", "nnUNetPlans"),
        ("nnUNetTrainerVMUNet", "nnUNetPlans"),
    ]:
        fold = planned / "nnUNet_results" / DATASET / f"{trainer}__{plans}__3d_fullres" / "fold_1"
        fold.mkdir(parents=True)
        (fold / "checkpoint_final.pth").touch()
    (planned / "images").mkdir()
    return planned


def test_env_prints_what_a_shell_can_evaluate(capsys, monkeypatch):
    monkeypatch.setenv(EXT_TRAINER, "/somebody's folder")
    assert main(["env"]) == 0
    script = f'{capsys.readouterr().out}printf %s "${EXT_TRAINER}"'
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert shell.stdout == f"/somebody's folder{os.pathsep}{trainers_folder()}"


def test_run_lists_nnunets_commands_and_our_trainers(capsys):
    assert main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("nnUNetv2_train", "nnUNetv2_find_best_configuration", TRAINER_NAMES_IN_WORDS))


@pytest.mark.parametrize("arguments", [["nnUNetv2_trian"], ["medmamba_env"]], ids=str)
def test_run_refuses_a_command_that_nnunet_does_not_have(arguments, capsys):
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"medmamba run: nnU-Net has no command '{arguments[0]}'; known: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["nnUNetv2_train", "nnUNetv2_evaluate_simple"])
def test_run_gives_nnunets_own_help_and_exit_code(command, capsys):
    before = sys.argv
    assert main(["run", command, "-h"]) == 0
    assert "usage:" in capsys.readouterr().out
    assert main(["run", command, "--no-such-option"]) == 2
    assert sys.argv is before


def test_run_turns_our_errors_into_one_line(planned, capsys):
    arguments = ["run", "nnUNetv2_train", "901", "3d_fullres", "0", "-device", "cpu", "-p", PLANS]
    assert main([*arguments, "-tr", "nnUNetTrainerVMNet"]) == 2
    error = capsys.readouterr().err
    assert "medmamba run: no trainer 'nnUNetTrainerVMNet'; medmamba has nnUNetTrainerVMUNet" in error
    assert "Traceback" not in error


def test_run_shows_errors_of_nnunet_as_they_are(planned, capsys):
    assert main(["run", "nnUNetv2_train", "901", "3d_fullres", "0", "-device", "tpu"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("unset nnUNet_preprocessed", "901 3d_fullres 0", "nnUNet_preprocessed is not set"),
        ("unset nnUNet_results", "901 3d_fullres 0", "nnUNet_results is not set"),
        ("", "7 3d_fullres 0", "no dataset '7'"),
        ("raw only", "7 3d_fullres 0", "Dataset007_Raw is not preprocessed; run `nnUNetv2_plan_and_preprocess -d 7`"),
        ("", "901 3d_fullres 0 -p Nothing", f"no plans Nothing in .*; there are {PLANS}, nnUNetPlans"),
        ("", "901 3d 0", "no configuration '3d'; known: 2d, 3d_fullres"),
        ("", "901 3d_fullres x", "fold 'x' is neither a number nor 'all'"),
        ("", "901 2d 0", "holds no preprocessed data; run `nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans -c 2d`"),
        ("", "901 3d_fullres 0 -num_gpus 2", "-num_gpus 2 needs CUDA devices, and -device is cpu; leave one of the"),
        ("", "901 3d_fullres 0 -pretrained_weights w.pth", "-pretrained_weights w.pth is not a file"),
        ("patch", f"901 3d_fullres 0 -p {PLANS}", "patch 16x20x16 does not fit .* axis 1 must be a multiple of 8"),
        ("network", f"901 3d_fullres 0 -p {PLANS}", r"the plans name the network medmamba\.networks\.other\.net"),
    ],
    ids=str,
)
def test_train_answers_bad_input_with_one_line(change, arguments, message, planned, monkeypatch, capsys):
    plans_file = planned / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json"
    plans = json.loads(plans_file.read_text())
    if change.startswith("unset"):
        monkeypatch.delenv(change.split()[1])
    elif change == "raw only":
        (planned / "nnUNet_raw" / "Dataset007_Raw").mkdir()
    elif change == "patch":
        plans["configurations"]["3d_fullres"]["patch_size"] = [16, 20, 16]
    elif change == "network":
        plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "medmamba.networks.other.net"
    plans_file.write_text(json.dumps(plans))
    assert_one_line("train", [*arguments.split(), "-device", "cpu"], message, capsys)
    assert list((planned / "nnUNet_results").iterdir()) == []


def test_train_without_a_gpu_says_so(planned, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line("train", ["901", "3d_fullres", "0"], "finds no CUDA device .* add -device cpu", capsys)


@pytest.mark.parametrize(
    ("gpus", "wanted", "message"),
    [
        (1, 2, "-num_gpus 2, and this torch finds 1; choose with CUDA_VISIBLE_DEVICES"),
        (8, 3, "-num_gpus 3 shares out a batch of 2, so a GPU would have nothing; .*--batch-size 3"),
    ],
)
def test_train_refuses_more_gpus_than_there_are_devices_or_samples(gpus, wanted, message, planned, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert_one_line("train", ["901", "3d_fullres", "0", "-num_gpus", str(wanted)], message, capsys)


def test_train_refuses_a_trainer_of_another_network(planned, capsys, monkeypatch):
    other = replace(NETWORKS["vmunet"], name="other")
    monkeypatch.setitem(NETWORKS, "vmunet", replace(NETWORKS["vmunet"], build="medmamba.networks.other.net"))
    monkeypatch.setitem(NETWORKS, "other", other)
    arguments = f"901 3d_fullres 0 -device cpu -p {PLANS} -tr nnUNetTrainerVMUNet".split()
    assert_one_line("train", arguments, "made for the network other, the trainer trains vmunet", capsys)
    assert list((planned / "nnUNet_results").iterdir()) == []


@pytest.fixture
def cascade(planned, tiny_plans):
    """Folders with plans of a cascade; returns the folder of its first stage's predictions."""
    full = tiny_plans["configurations"]["3d_fullres"]
    tiny_plans["configurations"]["3d_lowres"] = {**full, "next_stage": "3d_cascade_fullres"}
    second = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    tiny_plans["configurations"]["3d_cascade_fullres"] = second
    (planned / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json").write_text(json.dumps(tiny_plans))
    first_stage = planned / "nnUNet_results" / DATASET / f"nnUNetTrainerVMUNet__{PLANS}__3d_lowres"
    predicted = first_stage / "predicted_next_stage" / "3d_cascade_fullres"
    predicted.mkdir(parents=True)
    return predicted


@pytest.mark.parametrize("fold", ["0", "5", "all"])
def test_train_needs_the_predictions_of_the_first_stage_of_a_cascade(fold, cascade, capsys):
    arguments = f"901 3d_cascade_fullres {fold} -device cpu -p {PLANS}".split()
    for case in ("hippocampus_148", "hippocampus_149"):
        (cascade / f"{case}.b2nd").touch()
    message = r"lacks 1 of 3 cases \(hippocampus_320\); train 3d_lowres with -tr nnUNetTrainerVMUNet first"
    assert_one_line("train", arguments, message, capsys)
    (cascade / "hippocampus_320.b2nd").touch()
    assert preflight.check_training(arguments) == [*arguments, "-tr", "nnUNetTrainerVMUNet"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "3d_cascade_fullres reads the segmentations of 3d_lowres; predict the images with -c 3d_lowres first"),
        (["-prev_stage_predictions", "nowhere"], "-prev_stage_predictions nowhere is not a folder; it holds what"),
    ],
    ids=str,
)
def test_predict_needs_the_predictions_of_the_first_stage_of_a_cascade(given, message, cascade, tmp_path, capsys):
    second = tmp_path / "nnUNet_results" / DATASET / f"nnUNetTrainerVMUNet__{PLANS}__3d_cascade_fullres"
    (second / "fold_0").mkdir(parents=True)
    (second / "fold_0" / "checkpoint_final.pth").touch()
    shutil.copy(tmp_path / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json", second / "plans.json")
    arguments = f"-d 901 -p {PLANS} -c 3d_cascade_fullres -f 0 -device cpu -o out -i {tmp_path}".split()
    assert_one_line("predict", [*arguments, *given], message, capsys)
    assert preflight.check_prediction([*arguments, "-prev_stage_predictions", str(tmp_path)])


@pytest.mark.parametrize(
    ("plans", "given", "added"),
    [
        (PLANS, [], ["-tr", "nnUNetTrainerVMUNet"]),
        (PLANS, ["-tr", "nnUNetTrainer"], []),
        ("nnUNetPlans", [], []),
    ],
    ids=str,
)
def test_train_takes_the_trainer_of_the_plans_unless_one_is_given(plans, given, added, planned):
    arguments = ["-device", "cpu", "901", "3d_fullres", "all", "-p", plans, "--npz", "-num_gpus", "1", *given]
    assert preflight.check_training(arguments) == [*arguments, *added]


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["901"], []], ids=str)
@pytest.mark.parametrize("check", [preflight.check_training, preflight.check_prediction])
def test_arguments_that_cannot_be_read_are_left_to_nnunet(check, arguments, monkeypatch):
    monkeypatch.delenv("nnUNet_results", raising=False)
    assert check(arguments) == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-d 7 -p nnUNetPlans -c 3d_fullres", "no dataset '7' in .*; there are Dataset901_Isotropic"),
        ("-d 901 -p Other -c 3d_fullres", "no trained model for any trainer, plans Other, configuration 3d_fullres"),
        (
            "-d 901 -c 2d -tr T",
            "no trained model for T, plans nnUNetPlans, configuration 2d .*; there are nnUNetTrainerVMUNet__",
        ),
        ("-d 901 -c 3d_fullres", "trained by several trainers; add -tr nnUNetTrainerVMUNet or nnUNetTrainer"),
        (f"-d 901 -p {PLANS} -c 3d_fullres", "no checkpoint_final.pth for fold 0, 2, 3, 4 of .*; add -f 1"),
        (f"-d 901 -p {PLANS} -c 3d_fullres -f 1 -chk best.pth", "no best.pth for fold 1 of .*; finish a training"),
    ],
    ids=str,
)
def test_predict_answers_bad_input_with_one_line(arguments, message, trained, capsys):
    where = ["-i", str(trained / "images"), "-o", str(trained / "out"), "-device", "cpu"]
    assert_one_line("predict", [*arguments.split(), *where], message, capsys)
    assert not (trained / "out").exists()


def test_predict_needs_a_folder_of_images(trained, capsys):
    arguments = f"-d 901 -p {PLANS} -c 3d_fullres -f 1 -device cpu -o out -i nowhere".split()
    assert_one_line("predict", arguments, "-i nowhere is not a folder", capsys)


def test_predict_finds_the_only_trainer(trained):
    arguments = f"-d 901 -p {PLANS} -c 3d_fullres -f 1 -device cpu -o out -i {trained / 'images'}".split()
    assert preflight.check_prediction(arguments) == [*arguments, "-tr", "nnUNetTrainer"]
    shutil.rmtree(trained / "nnUNet_results" / DATASET)
    with pytest.raises(CommandError, match="no dataset '901'"):
        preflight.check_prediction(arguments)


def test_a_loss_that_is_not_finite_reaches_the_user_as_one_line(monkeypatch, capsys):
    class EntryPoint:
        def load(self):
            def diverge():
                raise UserFacingError("the training loss is nan")

            return diverge

    monkeypatch.setattr(host, "console_commands", lambda: {"nnUNetv2_train": EntryPoint()})
    assert_one_line("run", ["nnUNetv2_train"], "the training loss is nan", capsys)


def assert_one_line(command, arguments, message, capsys):
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"^medmamba {command}: .*{message}", error[-1]), error
    assert not any("Traceback" in line for line in error)
