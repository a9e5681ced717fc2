"""``medmamba collect``: results of nnU-Net folders as rows, and paired differences."""

from __future__ import annotations

import csv
import json
from copy import deepcopy

import numpy as np
import pytest
from scipy import stats

from medmamba.cli import main
from medmamba.nnunet.architecture import architecture_block
from medmamba_plans.results import difference_rows, differences, find_results, rows

CASES = 6
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "file_ending": ".nii.gz",
    "numTraining": 10,
}


@pytest.fixture
def write_result(tmp_path, load_plans):
    """Writes what nnU-Net leaves of one fold; returns the folder of the dataset."""

    def write(dice, *, mode="scan", run="seed_0", fold=0, trainer="nnUNetTrainerVMUNet", dataset=DATASET):
        plans = deepcopy(load_plans("isotropic"))
        if mode is not None:
            block = plans["configurations"]["3d_fullres"]["architecture"]
            options = {"base_features": 8, "depths": 1, "decoder_depths": 1, "ssm_mode": mode}
            plans["configurations"]["3d_fullres"]["architecture"] = architecture_block("vmunet", block, options)
        folder = tmp_path / run / "Dataset901_Isotropic"
        model = folder / f"{trainer}__{mode or 'stock'}Plans__3d_fullres"
        validation = model / f"fold_{fold}" / "validation"
        validation.mkdir(parents=True)
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(dataset))
        keys = [k if isinstance(k, int) else tuple(k) for k in list(dataset["labels"].values())[1:]]
        cases = [
            {
                "metrics": {str(key): {"Dice": value} for key, value in zip(keys, of_case, strict=True)},
                "reference_file": f"/labels/case.{10 * fold + number}.nii.gz",
            }
            for number, of_case in enumerate(dice.tolist())
        ]
        mean = {str(key): {"Dice": value} for key, value in zip(keys, np.nanmean(dice, axis=0).tolist(), strict=True)}
        (validation / "summary.json").write_text(json.dumps({"metric_per_case": cases, "mean": mean}))
        (validation.parent / "training_log_1.txt").write_text("Epoch time: 3.0 s\nEpoch time: 5 s\nEpoch time: 4 s\n")
        return folder

    return write


@pytest.fixture
def dice():
    return np.random.default_rng(0).uniform(0.5, 0.9, (CASES, 2))


def test_a_row_says_what_was_trained_and_how_well(write_result, dice):
    (row,) = rows(find_results([write_result(dice)]))
    expected = {
        "dataset": "Dataset901_Isotropic", "network": "vmunet", "ssm_mode": "scan", "run": "seed_0", "fold": "0",
        "epochs": 3, "seconds_per_epoch_median": 4.0, "cases": CASES, "dice_mean": round(dice.mean(), 4),
        "dice_Anterior": round(dice[:, 0].mean(), 4), "dice_Posterior": round(dice[:, 1].mean(), 4),
    }  # fmt: skip
    assert expected.items() <= row.items()
    assert list(row)[-1] == "source"


def test_the_number_of_parameters_is_that_of_the_network(write_result, dice):
    from medmamba.nnunet.architecture import build_network

    folder = write_result(dice)
    (result,) = find_results([folder])
    plans = json.loads(next(folder.glob("*/plans.json")).read_text())
    network = build_network(plans["configurations"]["3d_fullres"]["architecture"], 1, 3)
    assert result.parameters == sum(p.numel() for p in network.parameters())


def test_a_stock_network_has_its_own_name(write_result, dice):
    (row,) = rows(find_results([write_result(dice, mode=None, trainer="nnUNetTrainer")]))
    assert (row["network"], row["ssm_mode"]) == ("PlainConvUNet", "")


def test_a_class_that_is_nowhere_does_not_count(write_result, dice):
    dice[0, 1] = np.nan
    dice[1] = np.nan
    (result,) = find_results([write_result(dice)])
    assert result.dice_of_cases["case.0"] == pytest.approx(dice[0, 0])
    assert np.isnan(result.dice_of_cases["case.1"])
    assert result.dice_of_classes == pytest.approx(np.nanmean(dice, axis=0))


def test_regions_are_read_as_nnunet_writes_them(write_result, dice):
    dataset = {**DATASET, "labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    (row,) = rows(find_results([write_result(dice, dataset=dataset)]))
    assert row["dice_whole"] == round(dice[:, 0].mean(), 4)


def test_differences_are_paired_by_case_after_the_mean_over_runs(write_result, dice):
    noise = np.random.default_rng(1).normal(0, 0.02, (2, CASES, 2))
    folders = {
        write_result(dice + sign * noise[run] + shift, mode=mode, run=f"seed_{run}")
        for run in (0, 1)
        for mode, sign, shift in (("scan", 1, 0.01), ("identity", -1, 0.0))
    }
    (found,) = differences(find_results(sorted(folders)))
    expected = (2 * noise + 0.01).mean(axis=(0, 2))
    interval = stats.ttest_rel(expected, np.zeros(CASES)).confidence_interval()
    assert (found.first.ssm_mode, found.second.ssm_mode, found.cases, found.runs) == ("scan", "identity", CASES, 2)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean(), interval.low, interval.high))
    assert found.p == pytest.approx(stats.wilcoxon(expected).pvalue)


def test_folds_are_further_cases(write_result, dice):
    for fold in (0, 1):
        write_result(dice + 0.1, fold=fold)
        folder = write_result(dice, mode="identity", fold=fold)
    (found,) = differences(find_results([folder]))
    assert found.cases == 2 * CASES
    assert found.mean == pytest.approx(0.1)


def test_a_scan_is_compared_with_controls_and_stock_networks_only(write_result, dice):
    for mode in ("scan", "identity", "lti", None):
        folder = write_result(dice, mode=mode)
    found = difference_rows(differences(find_results([folder])))
    assert {(row["first"], row["second"]) for row in found} == {
        ("vmunet scan", "vmunet identity"),
        ("vmunet scan", "vmunet lti"),
        ("vmunet scan", "PlainConvUNet"),
    }
    assert all((row["dice_difference"], row["p_wilcoxon"]) == (0, 1) for row in found)


def test_the_command_prints_and_writes_both_tables(write_result, dice, tmp_path, capsys):
    for mode in ("scan", "identity"):
        folder = write_result(dice, mode=mode)
    out, paired = tmp_path / "out.csv", tmp_path / "paired.csv"
    assert main(["collect", str(folder), "--out", str(out), "--paired", str(paired)]) == 0
    printed = capsys.readouterr().out
    assert "vmunet scan - vmunet identity: +0.0000 Dice" in printed
    assert [row["ssm_mode"] for row in csv.DictReader(out.open())] == ["identity", "scan"]
    assert [row["cases"] for row in csv.DictReader(paired.open())] == [str(CASES)]


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert main(["collect", str(tmp_path)]) == 2
    assert "no finished fold" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", '{"mean": {}}'])
def test_a_damaged_summary_is_refused_with_its_folder(damage, write_result, dice, capsys):
    folder = write_result(dice)
    next(folder.glob("*/fold_0/validation/summary.json")).write_text(damage)
    assert main(["collect", str(folder)]) == 2
    assert "scanPlans__3d_fullres cannot be read" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_one_line(write_result, dice, capsys):
    assert main(["collect", str(write_result(dice)), "--out", "/nowhere/out.csv"]) == 2
    assert "/nowhere/out.csv cannot be written" in capsys.readouterr().err
