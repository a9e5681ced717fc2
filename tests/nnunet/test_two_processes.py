"""Our trainers in two processes that share a batch, as in a multi-GPU training; here on CPUs, over gloo."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from medmamba.networks import NETWORKS
from medmamba.nnunet.architecture import architecture_block
from medmamba.nnunet.names import trainer_name

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("two_processes.py")
#: Whether every decoder level has a head in the loss.
SUPERVISION = {"all heads": True, "one head": False}
CASES = [f"{network}, {heads}" for network in NETWORKS for heads in SUPERVISION]


def case_of(name: str, plans: dict) -> dict:
    network, _, heads = name.partition(", ")
    options = {"base_features": 8, "depths": 1, "decoder_depths": 1}
    if NETWORKS[network].has_scans:
        options["d_state"] = 2
    plans = json.loads(json.dumps(plans))
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"] = architecture_block(network, configuration["architecture"], options)
    plans["plans_name"] = f"nnUNet{network}{'All' if SUPERVISION[heads] else 'One'}Plans"
    plans["medmamba"] = {
        "schedule": {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    }
    return {"plans": plans, "trainer": trainer_name(network), "deep_supervision": SUPERVISION[heads]}


@pytest.fixture(scope="module")
def results(folder, raw_cases, load_plans):
    """What both processes report, and the folders that they worked in."""
    stock = load_plans("isotropic")
    stock["configurations"]["3d_fullres"].update(patch_size=[16, 16, 16], batch_size=2)
    dataset = folder.add_dataset(raw_cases, [stock])
    cases = {name: case_of(name, stock) for name in CASES}
    stock["configurations"]["3d_fullres"]["patch_size"] = [40, 56, 40]
    cases["whole"] = case_of("vmunet, all heads", stock)
    cases["whole"]["plans"]["plans_name"] = "nnUNetWholePlans"
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    (folder.root / "spec.json").write_text(json.dumps({"cases": cases, "dataset_json": dataset_json}))
    processes = [folder.start(sys.executable, str(WORKER), str(rank), str(folder.root)) for rank in (0, 1)]
    printed = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-4000:] for text in printed)
    reports = [json.loads((folder.root / f"result_{rank}.json").read_text()) for rank in (0, 1)]
    return SimpleNamespace(reports=reports, folder=folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_a_batch_each_have_the_gradients_of_one(case, results):
    for report in results.reports:
        assert report[case]["without"] == []
        assert report[case]["names agree"]
        assert report[case]["error"] < 1e-9
        assert report[case]["batch size"] == 1


def test_only_the_first_process_saves(results):
    assert [report["saves"] for report in results.reports] == [True, False]


def test_two_processes_train_and_validate_together(results):
    first, second = (report["whole"]["losses"] for report in results.reports)
    assert len(first) == 1
    assert first == second
    (model,) = results.folder.results.glob("*/*__nnUNetWholePlans__3d_fullres")
    assert (model / "fold_0" / "checkpoint_final.pth").is_file()
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1


def test_a_loss_that_is_not_finite_in_one_process_stops_both_with_its_cases(results):
    first, second = (report["infinite loss"] for report in results.reports)
    assert first == second
    assert "the training loss is inf" in first
    assert "(cases case_1)" in first


def test_gradients_that_are_not_finite_in_one_process_stop_both(results):
    for rank, report in enumerate(results.reports):
        assert "the gradients are not finite" in report["infinite gradients"]
        assert f"(cases case_{rank})" in report["infinite gradients"]
