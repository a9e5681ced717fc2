"""``medmamba plan`` as a user meets it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medmamba.cli import main

RAW = Path(__file__).resolve().parents[2] / "medmamba" / "demo" / "data" / "Dataset004_Hippocampus"
N_PROC_DA = "nnUNet_n_proc_DA"
SMALL = ["--network", "vmunet", "--variant", "small"]


@pytest.fixture
def assert_refused(capfd):
    """Runs the command and checks that it ends with exit code 2 and one line that holds a message."""

    def check(arguments, message):
        assert main(["plan", *arguments]) == 2
        error = capfd.readouterr().err.strip().splitlines()
        assert re.search(f"^medmamba plan: .*{message}", error[-1]), error
        assert not any("Traceback" in line for line in error)

    return check


def test_plans_are_written_beside_the_stock_ones(dataset, capsys):
    stock = (dataset / "nnUNetPlans.json").read_bytes()
    arguments = ["--batch-size", "2", "--epochs", "3", "--iterations", "4", "--val-iterations", "5", "--lr", "0.02"]
    arguments += ["--warmup-epochs", "1", "--save-every", "2", "--weight-decay", "0.1", "-c", "3d_fullres"]
    assert main(["plan", "-d", "901", *SMALL, *arguments]) == 0
    plans = json.loads((dataset / "nnUNetMedMambaVMUNetSmallPlans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["batch_size"] == 2
    assert plans["medmamba"]["schedule"] == {
        "num_epochs": 3,
        "num_iterations_per_epoch": 4,
        "num_val_iterations_per_epoch": 5,
        "optimizer": "SGD",
        "initial_lr": 0.02,
        "lr_decay": "poly",
        "weight_decay": 0.1,
        "eps": 1e-8,
        "warmup_epochs": 1,
        "save_every": 2,
    }
    assert (dataset / "nnUNetPlans.json").read_bytes() == stock
    out = capsys.readouterr().out
    assert f"wrote {dataset}" in out
    assert "nnUNetv2_preprocess -d 901 -plans_name nnUNetMedMambaVMUNetSmallPlans -c 3d_fullres" in out
    assert "medmamba train 901 3d_fullres 0 -p nnUNetMedMambaVMUNetSmallPlans" in out


def test_step_sizes_per_route_make_plans_of_their_own(dataset):
    assert main(["plan", "-d", "901", *SMALL, "--dt-init", "route"]) == 0
    plans = json.loads((dataset / "nnUNetMedMambaVMUNetSmallDtRoutePlans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    expected = {key: configuration[key] for key in ("patch_size", "spacing")}
    assert configuration["architecture"]["arch_kwargs"]["dt_init"] == expected
    assert not (dataset / "nnUNetMedMambaVMUNetSmallPlans.json").exists()


def test_a_mixer_and_its_options_go_into_the_plans(dataset):
    options = ["--mixer", "vim3d", "--mixer-set", "merge=sum", "--mixer-set", "d_state=4", "--plans-name", "Mine"]
    assert main(["plan", "-d", "901", *SMALL, *options]) == 0
    configuration = json.loads((dataset / "Mine.json").read_text())["configurations"]["3d_fullres"]
    spacing = configuration["spacing"]
    expected = {"name": "vim3d", "merge": "sum", "d_state": 4, "spacing": spacing}
    assert configuration["architecture"]["arch_kwargs"]["mixer"] == expected


def test_a_mixer_of_another_package_is_planned_by_name(dataset, add_distribution):
    add_distribution(
        "their-mixers",
        "[medmamba.mixers]\nmean3d = their_mixers:SPEC\n\n[medmamba.cores]\nmean3d = their_mixers:Mean3DCore\n",
        their_mixers="""
            from medmamba.mixers import IdentityCore
            from medmamba.presets import MixerSpec, Source

            class Mean3DCore(IdentityCore):
                pass

            SPEC = MixerSpec("mean3d", "Mean3D", Source("", "", 2026, ""), "", ("",), ("",), block={"core": "mean3d"})
        """,
    )
    for options, name in (([], ""), (["--ssm-mode", "identity"], "Identity")):
        assert main(["plan", "-d", "901", *SMALL, "--mixer", "mean3d", *options]) == 0
        plans = json.loads((dataset / f"nnUNetMedMambaVMUNetSmallMean3D{name}Plans.json").read_text())
        arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        assert arguments["mixer"]["name"] == "mean3d"
        assert arguments.get("ssm_mode", "scan") == (name.lower() or "scan")
    assert main(["plan", "-d", "901", *SMALL, "--ssm-mode", "mean3d", "--plans-name", "Core"]) == 0
    in_vim = ["--mixer", "vim3d", "--mixer-set", "core=mean3d", "--plans-name", "InVim"]
    assert main(["plan", "-d", "901", *SMALL, *in_vim]) == 0


def test_planning_again_replaces_and_says_so(dataset, capsys):
    for word, batch in (("wrote", 2), ("replaced", 3)):
        assert main(["plan", "-d", "901", *SMALL, "--batch-size", str(batch)]) == 0
        assert capsys.readouterr().out.startswith(word)
    plans = json.loads((dataset / "nnUNetMedMambaVMUNetSmallPlans.json").read_text())
    assert plans["configurations"]["2d"]["batch_size"] == 3


def test_data_that_are_preprocessed_are_not_preprocessed_again(dataset, capsys):
    (dataset / "nnUNetPlans_3d_fullres").mkdir()
    assert main(["plan", "-d", "901", *SMALL, "-c", "3d_fullres"]) == 0
    assert "nnUNetv2_preprocess" not in capsys.readouterr().out


def test_other_stock_plans_can_be_the_start(dataset, load_plans, assert_refused):
    plans = {**load_plans("isotropic"), "plans_name": "nnUNetResEncUNetMPlans"}
    plans["configurations"]["3d_fullres"]["data_identifier"] = "other_data"
    (dataset / "nnUNetResEncUNetMPlans.json").write_text(json.dumps(plans))
    assert main(["plan", "-d", "901", *SMALL, "--from", "nnUNetResEncUNetMPlans"]) == 0
    ours = json.loads((dataset / "nnUNetMedMambaVMUNetSmallPlans.json").read_text())
    assert ours["configurations"]["3d_fullres"]["data_identifier"] == "other_data"
    assert ours["medmamba"]["derived_from"] == "nnUNetResEncUNetMPlans"
    assert_refused(["-d", "901", *SMALL], "was made for the network vmunet from nnUNetResEncUNetMPlans; choose another")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-d 5 --network vmunet", "no dataset '5' in .*; there are Dataset901_Isotropic"),
        ("-d 901 --network vmnet", "no network 'vmnet'; known: .*vmunet"),
        ("-d 901 --network vmunet --variant XXL", "no variant 'XXL'; known: .*small"),
        ("-d 901 --network vmunet --geometry round", "'round'; known: native, faithful"),
        ("-d 901 --network vmunet --ssm-mode magic", "'magic'; known: .*identity"),
        ("-d 901 --network vmunet --mixer vim", "no mixer 'vim'; known: .*vim3d"),
        ("-d 901 --network vmunet --mixer-set merge=mean", "--mixer-set changes a mixer; name it with --mixer"),
        ("-d 901 --network vmunet --mixer vim3d --mixer-set merge", "--mixer-set merge is not NAME=VALUE"),
        ("-d 901 --network vmunet --routes zigzag", "'zigzag'; known: .*raster6"),
        ("-d 901 --network vmunet --patch-size 40 50 40", "axis 1 must be a multiple of 8, not 50; use 48 or 56"),
        ("-d 901 --network vmunet -c 3d_lowres", "no configuration 3d_lowres; known: 2d, 3d_fullres"),
        ("-d 901 --network vmunet --from Nothing", "no plans Nothing in .*; there are nnUNetPlans"),
        (
            "-d 901 --network vmunet --plans-name nnUNetPlans",
            "was made for something else; choose another --plans-name",
        ),
        ("-d 901 --network vmunet --plans-name a__b", "contains '__'"),
        ("-d 901 --network vmunet --optimizer Adam", "no optimizer 'Adam'; known: SGD, AdamW"),
        ("-d 901 --network vmunet --epochs 0", "num_epochs is 0; expected a whole number of 1 or more"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_no_file(arguments, message, dataset, assert_refused):
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    assert_refused(arguments.split(), message)
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before


@pytest.mark.parametrize("value", [None, "/no/such/folder"], ids=str)
def test_a_missing_folder_is_named_with_its_variable(value, dataset, monkeypatch, assert_refused):
    monkeypatch.delenv("nnUNet_preprocessed")
    if value is not None:
        monkeypatch.setenv("nnUNet_preprocessed", value)
    assert_refused(["-d", "901", *SMALL], "nnUNet_preprocessed is (not set|/no/such/folder, which is not a folder)")


@pytest.mark.parametrize("has_raw_folder", [True, False])
def test_a_dataset_without_plans_and_without_data_cannot_be_planned(
    has_raw_folder, dataset, monkeypatch, assert_refused
):
    (dataset / "nnUNetPlans.json").unlink()
    if not has_raw_folder:
        monkeypatch.delenv("nnUNet_raw")
    assert_refused(["-d", "901", *SMALL], "has no nnUNetPlans and no raw data to plan from")
    assert list(dataset.iterdir()) == []


@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_a_file_of_that_name_that_is_not_ours_stays(content, dataset, assert_refused):
    path = dataset / "nnUNetMedMambaVMUNetSmallPlans.json"
    path.write_text(content)
    assert_refused(["-d", "901", *SMALL], "cannot be read|was made for something else")
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written_is_named(dataset, monkeypatch, assert_refused):
    from medmamba import files

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    assert_refused(["-d", "901", *SMALL], r"cannot be written \(Permission denied\)")


def test_a_dataset_that_nnunet_refuses_is_one_line_with_its_reason(dataset, assert_refused):
    raw = dataset.parents[1] / "nnUNet_raw" / "Dataset901_Isotropic"
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "labelsTr").mkdir()
    (raw / "dataset.json").write_text((RAW / "dataset.json").read_text())
    (dataset / "nnUNetPlans.json").unlink()
    assert_refused(["-d", "901", *SMALL], "nnU-Net cannot plan Dataset901_Isotropic: .+; check the dataset with")
    assert list(dataset.glob("*Plans.json")) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [("--ssm-mode magic", "'magic'; known: .*identity"), ("--routes zigzag", "'zigzag'; known: .*raster6")],
    ids=str,
)
def test_options_are_checked_before_a_dataset_is_read(option, message, dataset, assert_refused):
    shutil.copytree(RAW, dataset.parents[1] / "nnUNet_raw" / RAW.name)
    assert_refused(["-d", "4", *SMALL, *option.split()], message)
    assert not (dataset.parent / RAW.name).exists()


@pytest.mark.slow
def test_a_raw_dataset_gets_fingerprint_stock_plans_and_ours(dataset, monkeypatch, capfd):
    shutil.copytree(RAW, dataset.parents[1] / "nnUNet_raw" / RAW.name)
    monkeypatch.setenv(N_PROC_DA, "0")  # which alone would stop nnU-Net's planner
    assert main(["plan", "-d", "4", *SMALL, "-np", "1"]) == 0
    written = {path.name for path in (dataset.parent / RAW.name).iterdir()}
    assert {"dataset_fingerprint.json", "nnUNetPlans.json", "nnUNetMedMambaVMUNetSmallPlans.json"} <= written
    out = capfd.readouterr().out
    assert "planning with nnU-Net" in out
    assert "2D U-Net configuration" not in out
    assert os.environ.get(N_PROC_DA) == "0"


@pytest.mark.parametrize("module", ["medmamba_plans", "medmamba_plans.commands"])
def test_light_modules_stay_light(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'nnunetv2') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert child.stdout.strip() == "[]", child.stderr


def test_adamw_comes_with_the_settings_of_the_networks_paper(dataset):
    arguments = ["--network", "msvmunet", "--optimizer", "AdamW", "--lr-decay", "cosine", "--eps", "1e-6"]
    assert main(["plan", "-d", "901", "--variant", "small", "-c", "3d_fullres", *arguments]) == 0
    schedule = json.loads((dataset / "nnUNetMedMambaMSVMUNetSmallPlans.json").read_text())["medmamba"]["schedule"]
    settings = {name: schedule[name] for name in ("initial_lr", "weight_decay", "eps", "lr_decay")}
    assert settings == {"initial_lr": 5e-4, "weight_decay": 1e-3, "eps": 1e-6, "lr_decay": "cosine"}


def test_any_argument_of_the_network_can_be_set(dataset):
    arguments = ["--set", "d_state=4", "--set", "depths=[1, 1, 1, 2]", "--plans-name", "Mine", "-c", "3d_fullres"]
    assert main(["plan", "-d", "901", *SMALL, *arguments]) == 0
    plans = json.loads((dataset / "Mine.json").read_text())
    chosen = {"d_state": 4, "depths": [1, 1, 1, 2]}
    assert chosen.items() <= plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].items()
    assert plans["medmamba"]["options"] == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "d_state=4"], "--set makes an experiment of its own; name its plans with --plans-name"),
        (["--set", "d_state", "--plans-name", "Mine"], "--set d_state is not NAME=VALUE"),
        (["--set", "d_stat=4", "--plans-name", "Mine"], "unexpected keyword argument 'd_stat'"),
        (["--set", "strides=2", "--plans-name", "Mine"], "strides cannot be set: nnU-Net or its plans decide"),
    ],
    ids=["unnamed", "no value", "unknown", "planned"],
)
def test_arguments_that_cannot_be_set_are_refused(arguments, message, dataset, assert_refused):
    assert_refused(["-d", "901", *SMALL, "-c", "3d_fullres", *arguments], re.escape(message))
    assert not (dataset / "Mine.json").exists()
