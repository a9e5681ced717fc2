"""Bad input around nnU-Net's folders: one line with the cause and the remedy."""

from __future__ import annotations

import json

import pytest

from medmamba.command import CommandError
from medmamba.nnunet import folders


@pytest.fixture
def root(tmp_path):
    for name in ("Dataset004_Hippocampus", "Dataset012_A", "Dataset012_B", "nonsense"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "nnUNet_results is not set; it names the folder of trained models: export nnUNet_results="),
        ("", "is not set"),
        ("/no/such/folder", "is /no/such/folder, which is not a folder; create it"),
    ],
    ids=str,
)
def test_a_variable_that_leads_nowhere(value, message, monkeypatch):
    monkeypatch.delenv("nnUNet_results", raising=False)
    if value is not None:
        monkeypatch.setenv("nnUNet_results", value)
    with pytest.raises(CommandError, match=message):
        folders.folder("nnUNet_results")
    assert folders.folder_or_none("nnUNet_results") is None


@pytest.mark.parametrize("name", ["4", "004", "Dataset004_Hippocampus"])
def test_a_dataset_is_found_by_number_and_name(name, root):
    assert folders.find_dataset(name, [root]) == "Dataset004_Hippocampus"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("5", "no dataset '5' in .*; there are Dataset004_Hippocampus, Dataset012_A, Dataset012_B"),
        ("Hippocampus", "no dataset 'Hippocampus'"),
        ("12", "dataset number 12 belongs to Dataset012_A and Dataset012_B"),
    ],
)
def test_a_dataset_that_is_not_there_lists_those_that_are(name, message, root):
    with pytest.raises(CommandError, match=message):
        folders.find_dataset(name, [root])


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(CommandError, match="there is no dataset at all"):
        folders.find_dataset("4", [tmp_path])


def test_missing_plans_list_those_there_are(tmp_path):
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps({"plans_name": "nnUNetPlans", "configurations": {}}))
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CommandError, match=r"no plans other in .*; there are nnUNetPlans$"):
        folders.read_plans(tmp_path, "other")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "is not a plans file"), ("{}", "has no configurations")]
)
def test_a_file_that_is_no_plans_file(content, message, tmp_path):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(CommandError, match=message):
        folders.read_plans(tmp_path, "p")


def test_a_configuration_comes_with_what_it_inherits(load_plans):
    plans = load_plans("cascade")
    inherited = folders.configuration_of(plans, "3d_cascade_fullres")
    assert inherited["patch_size"] == plans["configurations"]["3d_fullres"]["patch_size"]
    assert inherited["previous_stage"] == "3d_lowres"


def test_an_unknown_configuration_lists_the_known(load_plans):
    with pytest.raises(CommandError, match="no configuration '3d'; known: 2d, 3d_fullres"):
        folders.configuration_of(load_plans("isotropic"), "3d")
