"""The plans in ``plans/ready`` fit this version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medmamba.diagnostics import GB
from medmamba.networks import NETWORKS
from medmamba.nnunet.architecture import build_network, check_patch, network_of
from medmamba.nnunet.folders import configuration_of
from medmamba_plans.derive import PRESETS
from medmamba_plans.planner import predicted_peak

READY = Path(__file__).resolve().parents[2] / "plans" / "ready"
FILES = sorted(READY.glob("Dataset*/*.json"))
#: Channels and classes of the datasets.
ENDS = {"Dataset004": (1, 3), "Dataset102": (1, 2), "Dataset103": (1, 2), "Dataset104": (4, 2)}


def dataset_json(file: Path) -> dict:
    channels, classes = ENDS[file.parent.name[:10]]
    return {
        "channel_names": {str(i): "MRI" for i in range(channels)},
        "labels": {"background": 0, **{f"label {i}": i for i in range(1, classes)}},
    }


def test_every_network_with_scans_has_plans_for_every_dataset():
    networks = {name for name, spec in NETWORKS.items() if spec.has_scans}
    found = {(file.parent.name[:10], json.loads(file.read_text())["medmamba"]["network"]) for file in FILES}
    assert found == {(dataset, network) for dataset in ENDS for network in networks}


@pytest.fixture(params=FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def file(request) -> Path:
    return request.param


def test_ready_plans_build(file):
    plans = json.loads(file.read_text())
    assert plans["plans_name"] == file.stem
    for name in plans["configurations"]:
        configuration = configuration_of(plans, name)
        block = configuration["architecture"]
        assert network_of(block) == plans["medmamba"]["network"]
        check_patch(configuration["patch_size"], block["arch_kwargs"]["strides"])
        with torch.device("meta"):
            build_network(block, *ENDS[file.parent.name[:10]])


@pytest.mark.nightly
def test_ready_plans_keep_their_budget(file):
    plans = json.loads(file.read_text())
    for name in plans["configurations"]:
        assert predicted_peak(plans, name, dataset_json(file)) <= PRESETS["M"] * GB
