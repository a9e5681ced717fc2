"""A small preprocessed dataset, stock plans and folders for the tests of the nnU-Net room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
DATASET = "Dataset901_Isotropic"
CASES = ("hippocampus_148", "hippocampus_149", "hippocampus_320")
#: A network of a few thousand parameters with everything the real one has.
TINY = {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2, "routes": ["dhw", "dhw:reverse"]}


@pytest.fixture(scope="session")
def raw_cases() -> Path:
    """Folder with real hippocampus MRIs in nnU-Net's raw layout, shipped with the package."""
    return TESTS.parent / "medmamba" / "demo" / "data" / "Dataset004_Hippocampus"


@pytest.fixture(scope="session")
def load_plans() -> Callable[[str], dict[str, Any]]:
    """Stock plans by the name of their file in ``tests/data/plans``."""
    return lambda name: json.loads((TESTS / "data" / "plans" / f"{name}.json").read_text())


@pytest.fixture
def stock_plans(load_plans) -> dict[str, Any]:
    """Stock plans of the small dataset, with a patch of 16x16x16 and a batch of 2."""
    plans = load_plans("isotropic")
    plans["configurations"]["3d_fullres"].update(patch_size=[16, 16, 16], batch_size=2)
    plans["configurations"]["2d"].update(patch_size=[16, 16], batch_size=2)
    return plans


@pytest.fixture
def tiny_plans(stock_plans) -> dict[str, Any]:
    """Plans of ours for the small dataset: a tiny VM-UNet and one epoch of two iterations."""
    from medmamba.nnunet.architecture import architecture_block

    plans = deepcopy(stock_plans)
    plans["plans_name"] = "nnUNetMedMambaVMUNetPlans"
    for configuration in plans["configurations"].values():
        options = {**TINY, **({} if len(configuration["patch_size"]) == 3 else {"routes": ["hwd", "hwd:reverse"]})}
        configuration["architecture"] = architecture_block("vmunet", configuration["architecture"], options)
    schedule = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    plans["medmamba"] = {"network": "vmunet", "schedule": schedule, "note": "kept"}
    return plans


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory, raw_cases, load_plans) -> Path:
    """``nnUNet_preprocessed`` with three real cases, preprocessed by nnU-Net in this process; do not write to it."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    root = tmp_path_factory.mktemp("nnUNet_preprocessed")
    target = root / DATASET
    manager = PlansManager(load_plans("isotropic"))
    configuration = manager.get_configuration("3d_fullres")
    data = target / configuration.data_identifier
    (target / "gt_segmentations").mkdir(parents=True)
    data.mkdir()
    for case in CASES:
        image, label = raw_cases / "imagesTr" / f"{case}_0000.nii.gz", raw_cases / "labelsTr" / f"{case}.nii.gz"
        configuration.preprocessor_class(verbose=False).run_case_save(
            str(data / case), [str(image)], str(label), manager, configuration, dataset_json
        )
        shutil.copy(label, target / "gt_segmentations")
    (target / "dataset.json").write_text(json.dumps(dataset_json))
    (target / "dataset_fingerprint.json").write_text("{}")
    (target / "splits_final.json").write_text(json.dumps([{"train": CASES[:2], "val": CASES[2:]}]))
    return root


@pytest.fixture
def folders(preprocessed, tmp_path, monkeypatch) -> Path:
    """nnU-Net's variables, calm settings, and a copy of the preprocessed dataset that the test may change."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    shutil.copytree(preprocessed / DATASET, tmp_path / "nnUNet_preprocessed" / DATASET)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    return tmp_path


@pytest.fixture
def make_trainer(folders, raw_cases) -> Callable[..., Any]:
    """Builds a trainer on the CPU as ``nnUNetv2_train`` does."""
    import torch

    def make(name: str, plans: dict[str, Any], configuration: str = "3d_fullres") -> Any:
        from medmamba.nnunet.trainers import TRAINERS

        dataset_json = json.loads((raw_cases / "dataset.json").read_text())
        plans = {**plans, "continue_training": False}
        return TRAINERS[name](plans, configuration, 0, dataset_json, torch.device("cpu"))

    return make
