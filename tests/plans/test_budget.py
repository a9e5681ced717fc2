"""Patch and batch for a GPU budget, on invented datasets with the geometry of real ones."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

from medmamba.cli import main
from medmamba.diagnostics import GB, MemoryModel
from medmamba.networks import NETWORKS
from medmamba.nnunet.architecture import build_network, check_patch, network_ends
from medmamba.nnunet.folders import configuration_of
from medmamba_plans.derive import PRESETS, PlanError, Request, derive_plans
from medmamba_plans.planner import MIN_BATCH, MOST_SLICES, plan_for_budget, predicted_peak, share_data


@dataclass(frozen=True)
class Geometry:
    """A dataset of equal cases: voxels and mm per axis as in the files, cases, channels, classes, nnU-Net's patch."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    cases: int
    channels: int
    classes: int
    patch_size: tuple[int, ...]


GEOMETRIES = {
    "small MRI": Geometry((36, 50, 35), (1, 1, 1), 195, 1, 3, (40, 56, 40)),
    "axes permuted": Geometry((125, 72, 124), (2.5, 3.92, 3.92), 100, 1, 5, (80, 128, 128)),
    "coarse slices": Geometry((66, 95, 96), (3.27, 1.95, 1.95), 34, 1, 2, (80, 96, 96)),
    "anisotropic": Geometry((54, 160, 167), (3.27, 0.98, 0.98), 4, 1, 2, (56, 160, 192)),
    "four channels": Geometry((61, 81, 65), (2, 2, 2), 3, 4, 2, (64, 96, 80)),
    "tiny grid": Geometry((32, 64, 40), (1, 1, 1), 20, 2, 3, (32, 64, 40)),
    "images": Geometry((1, 512, 640), (999, 1, 1), 40, 3, 2, (512, 640)),
}
BUDGETS = (2.0, 8.0)
#: Geometries whose laws another states as well: a whole volume in a patch, thick slices, more than one channel.
ALIKE = ("small MRI", "coarse slices", "four channels")
LARGE = Geometry((250, 512, 512), (1.5, 0.8, 0.8), 100, 1, 3, ())


def write_dataset(root: Path, name: str, geometry: Geometry) -> dict[str, Any]:
    """dataset.json and fingerprint where nnU-Net expects them; returns dataset.json."""
    channels = {str(i): "MRI" for i in range(geometry.channels)}
    labels = {"background": 0, **{f"organ {i}": i for i in range(1, geometry.classes)}}
    cases = {f"case_{i}": {"images": ["none.nii.gz"], "label": "none.nii.gz"} for i in range(geometry.cases)}
    dataset_json = {
        "channel_names": channels,
        "labels": labels,
        "numTraining": geometry.cases,
        "file_ending": ".nii.gz",
        "dataset": cases,
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    statistics = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    fingerprint = {
        "spacings": [list(map(float, geometry.spacing))] * geometry.cases,
        "shapes_after_crop": [list(geometry.shape)] * geometry.cases,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": dict.fromkeys(channels, statistics),
    }
    for folder, files in (
        ("nnUNet_raw", {"dataset.json": dataset_json}),
        ("nnUNet_preprocessed", {"dataset_fingerprint.json": fingerprint, "dataset.json": dataset_json}),
    ):
        (root / folder / name).mkdir(parents=True)
        for file, content in files.items():
            (root / folder / name / file).write_text(json.dumps(content))
    return dataset_json


@pytest.fixture(scope="module")
def nnunet_root(tmp_path_factory):
    """Folders that nnU-Net's planners of this process use: they read the variables when they are imported."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
            (root / variable).mkdir()
            patch.setattr(default_experiment_planner, variable, str(root / variable))
            patch.setenv(variable, str(root / variable))
        yield root


@dataclass(frozen=True)
class Planned:
    """A dataset with its stock plans and ours for every budget."""

    geometry: Geometry
    dataset_json: dict[str, Any]
    stock: dict[str, Any]
    plans: dict[float, dict[str, Any]]

    def configurations(self):
        """(budget, plans, name, configuration) of everything that was planned."""
        for budget, plans in self.plans.items():
            for name in plans["configurations"]:
                yield budget, plans, name, configuration_of(plans, name)


def plan_all(root: Path, name: str, geometry: Geometry, requests: list[Request]) -> Planned:
    dataset_json = write_dataset(root, name, geometry)
    stock, _ = plan_experiment_dataset(name)
    plans = {request.budget_gb: derive_plans(plan_for_budget(name, request, stock), request) for request in requests}
    return Planned(geometry, dataset_json, stock, plans)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.nightly] if name in ALIKE else []) for name in GEOMETRIES],
)
def planned(request, nnunet_root) -> Planned:
    number = 900 + list(GEOMETRIES).index(request.param)
    requests = [Request("vmunet", variant="small", gpu_gb=gb) for gb in BUDGETS]
    return plan_all(nnunet_root, f"Dataset{number}_Invented", GEOMETRIES[request.param], requests)


def test_nnunets_own_planner_sees_the_intended_geometry(planned):
    name = "3d_fullres" if len(planned.geometry.patch_size) == 3 else "2d"
    assert tuple(planned.stock["configurations"][name]["patch_size"]) == planned.geometry.patch_size


def test_the_prediction_stays_within_the_budget(planned):
    for budget, plans, name, _ in planned.configurations():
        assert predicted_peak(plans, name, planned.dataset_json) <= budget * GB, (budget, name)


def test_batches_are_2_or_more_and_not_absurd(planned):
    for _, _, _, configuration in planned.configurations():
        assert configuration["batch_size"] >= MIN_BATCH
        assert len(configuration["patch_size"]) == 3 or configuration["batch_size"] <= MOST_SLICES
        covered = configuration["batch_size"] * math.prod(configuration["patch_size"])
        dataset = planned.geometry.cases * math.prod(configuration["median_image_size_in_voxels"])
        # nnU-Net's 2D reads one slice of a case, and its cap is that of the volumes.
        assert len(configuration["patch_size"]) == 2 or configuration["batch_size"] == 2 or covered <= 1.5 * dataset


def test_every_configuration_builds_and_runs(planned):
    for _, plans, _, configuration in planned.configurations():
        block, patch = configuration["architecture"], configuration["patch_size"]
        check_patch(patch, block["arch_kwargs"]["strides"])
        channels, classes = network_ends(plans, configuration, planned.dataset_json)
        assert (channels, classes) == (planned.geometry.channels, planned.geometry.classes)
        with torch.device("meta"), torch.no_grad():
            outputs = build_network(block, channels, classes)(torch.empty(2, channels, *patch))
        assert outputs[0].shape == (2, classes, *patch)
        assert len(outputs) == len(block["arch_kwargs"]["strides"]) - 1


def test_preprocessed_data_are_those_of_the_stock_plans(planned):
    for _, plans, name, configuration in planned.configurations():
        if name in ("2d", "3d_fullres"):
            assert configuration["data_identifier"] == planned.stock["configurations"][name]["data_identifier"]
            assert configuration["spacing"] == planned.stock["configurations"][name]["spacing"]
        assert plans["transpose_forward"] == planned.stock["transpose_forward"]


def test_more_memory_never_gives_a_smaller_patch_nor_a_smaller_batch_of_the_same(planned):
    for name in planned.stock["configurations"]:
        sizes = []
        for budget in BUDGETS:
            configuration = planned.plans[budget]["configurations"][name]
            sizes.append((math.prod(configuration["patch_size"]), configuration["batch_size"]))
        assert sizes == sorted(sizes), name
        assert [a * b for a, b in sizes] == sorted(a * b for a, b in sizes), name


def test_plans_are_json_and_say_what_they_are_for(planned):
    for budget, plans in planned.plans.items():
        assert json.loads(json.dumps(plans)) == plans
        assert plans["plans_name"] == f"nnUNetMedMambaVMUNetSmall{budget:g}GPlans"
        assert plans["medmamba"]["gpu_gb"] == budget
        assert plans["experiment_planner_used"] == "MedMambaPlanner"


@pytest.mark.nightly
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_is_planned_by_its_own_memory(network, nnunet_root):
    geometry = GEOMETRIES["coarse slices"]
    number = 950 + list(NETWORKS).index(network)
    request = Request(network, variant="small", gpu_gb=2)
    planned = plan_all(nnunet_root, f"Dataset{number}_Network", geometry, [request])
    for budget, plans, name, configuration in planned.configurations():
        assert predicted_peak(plans, name, planned.dataset_json) <= budget * GB
        if name == "3d_fullres" and configuration["batch_size"] > 2:
            larger = {**plans["configurations"][name], "batch_size": configuration["batch_size"] + 1}
            more = {**plans, "configurations": {**plans["configurations"], name: larger}}
            whole = math.prod(configuration["patch_size"]) * configuration["batch_size"]
            filled = predicted_peak(more, name, planned.dataset_json) > budget * GB
            assert filled or whole > 0.9 * geometry.cases * math.prod(geometry.shape)


@pytest.mark.nightly
def test_a_cascade_fits_too_with_the_channels_of_its_first_stage(nnunet_root):
    requests = [Request("vmunet", variant="small", gpu_gb=gb) for gb in (2, 4)]
    planned = plan_all(nnunet_root, "Dataset990_Large", LARGE, requests)
    for budget, plans, name, configuration in planned.configurations():
        assert {"2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"} == set(plans["configurations"])
        assert predicted_peak(plans, name, planned.dataset_json) <= budget * GB, (budget, name)
        channels, _ = network_ends(plans, configuration, planned.dataset_json)
        assert channels == (3 if name == "3d_cascade_fullres" else 1)
        check_patch(configuration["patch_size"], configuration["architecture"]["arch_kwargs"]["strides"])
    for plans in planned.plans.values():
        ours, theirs = plans["configurations"]["3d_lowres"], planned.stock["configurations"]["3d_lowres"]
        assert ours["next_stage"] == "3d_cascade_fullres"
        is_same = ours["spacing"] == pytest.approx(theirs["spacing"])
        assert (ours["data_identifier"] == theirs["data_identifier"]) == is_same
        assert is_same or ours["data_identifier"] == f"{plans['plans_name']}_3d_lowres"


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["axes permuted", "anisotropic"])
def test_the_presets_of_the_full_network(name, nnunet_root):
    requests = [Request("vmunet", preset=preset) for preset in PRESETS]
    many = replace(GEOMETRIES[name], cases=400)  # the batch is not limited by the dataset
    planned = plan_all(nnunet_root, f"Dataset{970 + len(name)}_Preset", many, requests)
    for budget, plans, configuration, _ in planned.configurations():
        peak = predicted_peak(plans, configuration, planned.dataset_json) / GB
        assert peak <= budget
        assert peak > 0.75 * budget or configuration == "2d"
    patches = [math.prod(plans["configurations"]["3d_fullres"]["patch_size"]) for plans in planned.plans.values()]
    assert patches == sorted(patches)
    assert [plans["plans_name"] for plans in planned.plans.values()] == [
        f"nnUNetMedMambaVMUNet{preset}Plans" for preset in PRESETS
    ]


def test_data_that_differ_get_a_name_of_their_own(load_plans):
    stock = load_plans("cascade")
    plans = {**deepcopy(stock), "plans_name": "Ours"}
    plans["configurations"]["3d_lowres"]["spacing"] = [9.0, 9.0, 9.0]
    plans["configurations"]["2d"]["normalization_schemes"] = ["NoNormalization"]
    share_data(plans, stock)
    identifiers = {name: c.get("data_identifier") for name, c in plans["configurations"].items()}
    assert identifiers == {
        "2d": "Ours_2d",
        "3d_lowres": "Ours_3d_lowres",
        "3d_fullres": "nnUNetPlans_3d_fullres",
        "3d_cascade_fullres": None,
    }
    share_data(plans, {**stock, "transpose_forward": [1, 0, 2]})
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == "Ours_3d_fullres"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request("vmunet", preset="M"), "nnUNetMedMambaVMUNetMPlans"),
        (Request("vmunet", preset="XL", options={"ssm_mode": "identity"}), "nnUNetMedMambaVMUNetIdentityXLPlans"),
        (Request("vmunet", gpu_gb=11), "nnUNetMedMambaVMUNet11GPlans"),
        (Request("vmunet", gpu_gb=7.5, variant="small"), "nnUNetMedMambaVMUNetSmall7.5GPlans"),
        (Request("vmunet", gpu_gb=8), "nnUNetMedMambaVMUNet8GPlans"),
        # Here M is a size of the network.
        (Request("mednext", variant="M"), "nnUNetMedMambaMedNeXtMPlans"),
        (Request("mednext", preset="M"), "nnUNetMedMambaMedNeXt8GPlans"),
        (Request("mednext", preset="M", variant="L"), "nnUNetMedMambaMedNeXtL8GPlans"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_name_of_the_plans_holds_the_budget(request_, expected):
    assert request_.plans_name == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"preset": "small"},
            r"no preset 'small'; known: M, L, XL \(GPU memory\); small is a variant: --variant small",
        ),
        ({"preset": "XXL"}, r"no preset 'XXL'; known: M, L, XL \(GPU memory\)$"),
        ({"preset": "M", "gpu_gb": 11}, "preset M is a GPU of 8 GB; leave --gpu-gb out"),
        ({"gpu_gb": 0}, "a GPU of 0 GB is not possible"),
        ({"gpu_gb": math.nan}, "a GPU of nan GB is not possible"),
    ],
    ids=str,
)
def test_budgets_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        Request("vmunet", **arguments)


@pytest.fixture
def dataset_with_raw(nnunet_root, tmp_path_factory):
    """Number and preprocessed folder of a dataset that nnU-Net has planned."""
    number = 991 + sum(path.name.endswith("_Command") for path in (nnunet_root / "nnUNet_raw").iterdir())
    name = f"Dataset{number}_Command"
    write_dataset(nnunet_root, name, GEOMETRIES["small MRI"])
    plan_experiment_dataset(name)
    return str(number), nnunet_root / "nnUNet_preprocessed" / name


SMALL = ["--network", "vmunet", "--variant", "small"]


def test_the_command_plans_and_says_how_much_memory(dataset_with_raw, capsys):
    number, folder = dataset_with_raw
    stock = (folder / "nnUNetPlans.json").read_bytes()
    assert main(["plan", "-d", number, *SMALL, "--gpu-gb", "2", "-c", "3d_fullres"]) == 0
    out = capsys.readouterr().out
    plans = json.loads((folder / "nnUNetMedMambaVMUNetSmall2GPlans.json").read_text())
    batch = plans["configurations"]["3d_fullres"]["batch_size"]
    peak = predicted_peak(plans, "3d_fullres", json.loads((folder / "dataset.json").read_text())) / GB
    assert f"3d_fullres: patch 40x56x40, batch {batch}, {peak:.1f} GB, data nnUNetPlans_3d_fullres" in out
    assert ("UNCALIBRATED" in out) != MemoryModel.load("cuda").is_calibrated
    assert "above 2 GB" not in out
    assert (folder / "nnUNetPlans.json").read_bytes() == stock
    assert main(["plan", "-d", number, *SMALL, "--gpu-gb", "2", "-c", "3d_fullres", "--batch-size", "200"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("replaced")
    assert "above 2 GB: 3d_fullres (the patch or batch that you asked for)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu-gb 0.1", "no patch fits 0.1 GB"),
        ("--preset small", "small is a variant: --variant small"),
        ("--preset M --from nnUNetPlans", "leave --from out"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_met_is_one_line_and_leaves_no_file(arguments, message, dataset_with_raw, capfd):
    number, folder = dataset_with_raw
    before = sorted(path.name for path in folder.iterdir())
    assert main(["plan", "-d", number, *SMALL, *arguments.split()]) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert len(error) == 1
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_budget_needs_the_raw_dataset(dataset, capfd):
    assert main(["plan", "-d", "901", *SMALL, "--preset", "M"]) == 2
    assert "nnU-Net plans patch and batch from the raw dataset" in capfd.readouterr().err


def test_preset_and_gpu_gb_exclude_each_other(dataset, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "-d", "901", *SMALL, "--preset", "M", "--gpu-gb", "11"])
    assert "not allowed with argument --preset" in capsys.readouterr().err
