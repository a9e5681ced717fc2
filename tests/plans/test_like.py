"""Plans for a pretrained encoder: what they say, and what is refused in words."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

from medmamba.cli import main
from medmamba.nnunet.architecture import network_of
from medmamba_plans.derive import PlanError, Request
from medmamba_plans.like import Encoder, derive_like
from medmamba_plans.like_check import check_like

CONSTANTS = {"percentile_00_5": -175, "percentile_99_5": 250, "mean": -175, "std": 425}


def dataset_json(*channels: str, ending: str = ".nii.gz") -> dict:
    names = {str(i): name for i, name in enumerate(channels or ("MRI",))}
    return {"channel_names": names, "labels": {"background": 0, "organ": 1}, "file_ending": ending, "numTraining": 8}


@pytest.fixture
def described(dataset) -> Path:
    """The preprocessed dataset with its dataset.json: one channel of MRI."""
    (dataset / "dataset.json").write_text(json.dumps(dataset_json()))
    return dataset


def derive(stock: dict, path: Path, content: dict, **values) -> dict:
    encoder = Encoder.read(path)
    return derive_like(stock, encoder, Request(network=encoder.description.network, name="Mine", **values), content)


@pytest.mark.parametrize("name", ["isotropic", "anisotropic", "cascade"])
def test_plans_say_how_the_images_of_the_pretraining_were_made(name, load_plans, make_encoder):
    stock, path = load_plans(name), make_encoder(modality="ct")
    before = json.dumps(stock)
    plans = derive(stock, path, dataset_json("CT", "CT"))
    assert json.dumps(stock) == before
    assert json.loads(json.dumps(plans)) == plans
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["transpose_forward"] == plans["transpose_backward"] == [0, 1, 2]
    assert list(plans["configurations"]) == ["3d_fullres"]
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [1.0, 1.25, 1.5]
    assert configuration["patch_size"] == [32, 32, 32]
    assert configuration["normalization_schemes"] == ["CTNormalization"] * 2
    assert configuration["use_mask_for_norm"] == [False, False]
    assert configuration["data_identifier"] == "Mine_3d_fullres"
    assert "next_stage" not in configuration
    assert network_of(configuration["architecture"]) == "vmunet"
    for key in ("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs"):
        assert configuration[key] == stock["configurations"]["3d_fullres"][key]
    properties = plans["foreground_intensity_properties_per_channel"]
    for channel in ("0", "1"):
        assert CONSTANTS.items() <= properties[channel].items()
    kept = stock["foreground_intensity_properties_per_channel"]["0"].keys() - CONSTANTS.keys()
    assert kept
    assert all(properties["0"][key] == stock["foreground_intensity_properties_per_channel"]["0"][key] for key in kept)


def test_plans_name_the_file_that_they_are_like(load_plans, make_encoder):
    path = make_encoder()
    own = derive(load_plans("isotropic"), path, dataset_json())["medmamba"]
    assert own["like"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert own["like"]["file"] == path.name
    assert own["like"]["corpus"] == {"hash": "5eed", "volumes": 3}
    assert own["like"]["citation"] == ["First paper (2024)", "Second paper (2025)"]
    assert own["derived_from"] == f"encoder {own['like']['sha256'][:8]}"


def test_mri_is_normalised_per_volume_without_a_mask(load_plans, make_encoder):
    stock = load_plans("isotropic")
    stock["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]
    plans = derive(stock, make_encoder(), dataset_json("T1", "T2"))
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"] * 2
    assert configuration["use_mask_for_norm"] == [False, False]
    key = "foreground_intensity_properties_per_channel"
    assert plans[key] == stock[key]


def test_exchanged_axes_of_the_stock_plans_are_taken_back(load_plans, make_encoder):
    stock = load_plans("anisotropic")
    stock |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    stock |= {
        "original_median_spacing_after_transp": [3.0, 1.0, 2.0],
        "original_median_shape_after_transp": [30, 10, 20],
    }
    plans = derive(stock, make_encoder(), dataset_json())
    assert plans["original_median_spacing_after_transp"] == [1.0, 2.0, 3.0]
    assert plans["original_median_shape_after_transp"] == [10, 20, 30]
    assert plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"] == [10.0, 32.0, 60.0]


@pytest.mark.parametrize("patch", [(16, 16, 16), (32, 32, 32), (64, 64, 64), (128, 128, 128)], ids=str)
def test_a_batch_has_as_many_voxels_as_the_stock_one_and_two_patches_at_least(patch, load_plans, make_encoder):
    stock = load_plans("isotropic")
    before = stock["configurations"]["3d_fullres"]
    plans = derive(stock, make_encoder(), dataset_json(), patch_size=patch)
    batch, voxels = plans["configurations"]["3d_fullres"]["batch_size"], math.prod(patch)
    budget = before["batch_size"] * math.prod(before["patch_size"])
    assert batch == 2 or batch * voxels <= budget < (batch + 1) * voxels
    assert batch >= 2


def test_batch_and_patch_can_be_chosen(load_plans, make_encoder):
    plans = derive(load_plans("isotropic"), make_encoder(), dataset_json(), patch_size=[16, 24, 40], batch_size=5)
    configuration = plans["configurations"]["3d_fullres"]
    assert (configuration["patch_size"], configuration["batch_size"]) == ([16, 24, 40], 5)


def test_the_command_writes_plans_and_what_to_do_next(described, make_encoder, capsys):
    path = make_encoder()
    arguments = ["plan", "-d", "901", "--like", str(path), "--epochs", "100", "--iterations", "3", "--lr", "0.02"]
    for word in ("wrote", "replaced"):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        name = f"nnUNetMedMambaVMUNetLike{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}Plans"
        init = described / f"{name}_init.pth"
        assert f"{word} {described / name}.json" in out
        assert f"{word} {init}" in out
        assert f"nnUNetv2_preprocess -d 901 -plans_name {name} -c 3d_fullres" in out
        command = f"901 3d_fullres 0 -p {name} -pretrained_weights {init}"
        assert f"medmamba train {command} -tr nnUNetTrainerVMUNet_Finetune" in out
        assert f"nnUNetv2_train {command}" in out
        assert "learning rate 0.002 after a warm-up of 5 epochs" in out
        assert "cite: First paper (2024)\ncite: Second paper (2025)\n" in out
    plans = json.loads((described / f"{name}.json").read_text())
    schedule = plans["medmamba"]["schedule"]
    assert (schedule["num_epochs"], schedule["num_iterations_per_epoch"], schedule["initial_lr"]) == (100, 3, 0.02)


@pytest.fixture
def assert_refused(described, capfd):
    """Runs the command, and checks for exit code 2, one line with a message, and a folder that is as before."""

    def check(arguments: list[str], message: str) -> None:
        before = {path.name: path.read_bytes() for path in described.iterdir()}
        assert main(["plan", "-d", "901", *map(str, arguments)]) == 2
        error = capfd.readouterr().err.strip().splitlines()
        assert len(error) == 1, error
        assert re.search(f"^medmamba plan: .*{message}", error[0]), error
        assert {path.name: path.read_bytes() for path in described.iterdir()} == before

    return check


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--network mednext", "--network mednext contradicts the encoder, which is of vmunet; leave it out"),
        ("--geometry native", "the encoder decides its network; leave --geometry out"),
        ("--preset M --ssm-mode identity", "leave --preset, --ssm-mode out"),
        ("--routes raster4 --variant small", "leave --variant, --routes out"),
        ("--set d_state=4 --plans-name Mine", "leave --set out"),
        ("--dt-init route --gpu-gb 11", "leave --gpu-gb, --dt-init out"),
        ("-c 2d", "plans like an encoder have one configuration, 3d_fullres; leave -c out"),
        ("--patch-size 32 32 30", "axis 2 must be a multiple of 4, not 30; use 28 or 32"),
        ("--patch-size 32 32", r"patch \[32, 32\] has 2 axes"),
        ("--batch-size 0", "batch size 0 is not possible"),
        ("--epochs 0", "num_epochs is 0; expected a whole number"),
        ("--plans-name nnUNetPlans", "was made for something else; choose another --plans-name"),
        ("--plans-name a__b", "contains '__'"),
        ("--init /no/such/folder/init.pth", "/no/such/folder is not a folder; create it or choose another --init"),
        ("--from nnUNetPlans", "nnUNetPlans are of another network; leave --from out"),
        ("--from Nothing", "no plans Nothing in"),
        ("--from Mine --epochs 3 --batch-size 2", "used as they are; leave --batch-size, --epochs out"),
        ("--from Mine -c 2d 3d_fullres", "the initial weights are for one configuration"),
    ],
    ids=str,
)
def test_options_that_contradict_the_encoder_are_refused(arguments, message, make_encoder, assert_refused):
    assert_refused(["--like", make_encoder(), *arguments.split()], message)


@pytest.mark.parametrize(
    ("channels", "ending", "modality", "message"),
    [
        (["MRI"], ".nii.gz", "ct", "channel 0 of the dataset is 'MRI', the encoder was trained on CT"),
        (["CT", "PET"], ".nii.gz", "ct", "channel 1 of the dataset is 'PET'"),
        (["MRI", "ct"], ".nii.gz", "mr", "channel 1 of the dataset is CT, the encoder was trained on MR"),
        (["MRI"], ".mha", "mr", r"files end in '\.mha', and NibabelIOWithReorient.* reads \.nii and \.nii\.gz"),
    ],
    ids=str,
)
def test_a_dataset_of_another_kind_is_refused(
    channels, ending, modality, message, described, make_encoder, assert_refused
):
    (described / "dataset.json").write_text(json.dumps(dataset_json(*channels, ending=ending)))
    assert_refused(["--like", make_encoder(modality=modality)], message)


def test_an_old_dataset_json_is_read(described, make_encoder):
    content = dataset_json()
    content["modality"] = content.pop("channel_names")
    (described / "dataset.json").write_text(json.dumps(content))
    assert main(["plan", "-d", "901", "--like", str(make_encoder(modality="ct"))]) == 2
    assert list(described.glob("*Like*")) == []


def test_a_dataset_without_dataset_json_is_refused(described, make_encoder, assert_refused):
    (described / "dataset.json").unlink()
    assert_refused(["--like", make_encoder()], "has no dataset.json, which names channels and classes")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {
                "arguments": {"base_features": 8, "strides": [[1, 1], [2, 2], [2, 2]]},
                "patch_size": [32, 32],
                "spacing_mm": [1, 1],
                "axes": "AR",
            },
            "the encoder has 2 axes, and plans like it are for volumes",
        ),
        (
            {"axes": "RAS"},
            r"arrays with axes RAS read by NibabelIOWithReorient; known are NibabelIOWithReorient \(SAR\)",
        ),
        ({"reader": "SimpleITKIO"}, "arrays with axes SAR read by SimpleITKIO"),
    ],
    ids=["images", "axes", "reader"],
)
def test_an_encoder_whose_images_nnunet_cannot_make_is_refused(values, message, make_encoder, assert_refused):
    assert_refused(["--like", make_encoder(**values)], message)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_an_encoder_file_that_is_cut_short_is_refused(part, make_encoder, assert_refused):
    path = make_encoder()
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert_refused(["--like", path], "cannot be read as safetensors .*cut short")


def test_foreign_files_are_refused(tmp_path, assert_refused):
    import torch

    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    assert_refused(["--like", tmp_path / "foreign.safetensors"], "has no description of an encoder")
    torch.save({"network_weights": {"a": torch.zeros(2)}}, tmp_path / "checkpoint_final.pth")
    assert_refused(["--like", tmp_path / "checkpoint_final.pth"], "cannot be read as safetensors")
    assert_refused(["--like", tmp_path / "nothing"], "nothing is no file")


def test_options_of_the_encoder_need_one(assert_refused):
    assert_refused(["--network", "vmunet", "--seed", "1"], "--init and --seed are for --like")
    assert_refused([], "name a network, e.g. --network vmunet, or a pretrained encoder, --like FILE")


def test_plans_of_one_encoder_are_not_replaced_by_those_of_another(make_encoder, capfd, assert_refused):
    first, second = make_encoder(), make_encoder(seed=1, name="second")
    assert main(["plan", "-d", "901", "--like", str(first), "--plans-name", "Mine"]) == 0
    capfd.readouterr()
    assert_refused(
        ["--like", second, "--plans-name", "Mine"], "was made for the network vmunet from encoder [0-9a-f]{8};"
    )
    assert_refused(["--network", "vmunet", "--plans-name", "Mine"], "was made for the network vmunet from encoder")


def change(plans: dict, where: str, value: object) -> dict:
    """The plans with another value at a path of keys; ``*`` is the configuration."""
    *path, last = where.replace("*", "configurations.3d_fullres").split(".")
    target = plans
    for key in path:
        target = target[key]
    target[last] = value
    return plans


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("*.spacing", [1.0, 1.25, 2.0], "their spacing is 1 x 1.25 x 2 mm, the encoder's 1 x 1.25 x 1.5 mm"),
        ("*.spacing", [1.25, 1.0, 1.5], "their spacing is 1.25 x 1 x 1.5 mm"),
        ("*.spacing", [1.0, 1.25], "their spacing is 1 x 1.25 mm"),
        ("image_reader_writer", "SimpleITKIO", "read images with SimpleITKIO, the encoder needs NibabelIOWithReorient"),
        ("transpose_forward", [1, 0, 2], r"exchange the axes \(transpose_forward \[1, 0, 2\]\)"),
        (
            "*.normalization_schemes",
            ["ZScoreNormalization"],
            "their normalisation is .*, the encoder's CTNormalization",
        ),
        ("*.normalization_schemes", ["CTNormalization"] * 2, "for each of 1 channels"),
        ("foreground_intensity_properties_per_channel.0.mean", 12.5, "channel 0 is normalised with .*12.5"),
        ("*.architecture.network_class_name", "medmamba.networks.mednext.mednext", "their network is mednext"),
        ("*.architecture.network_class_name", "somewhere.Net", "their network is somewhere.Net, the encoder's vmunet"),
        ("*.architecture.network_class_name", "medmamba.networks.no.no", "does not have .*install the version"),
        ("*.architecture.arch_kwargs.strides", [[1, 1, 1], [2, 2, 2]], "their network has strides"),
        ("*.architecture.arch_kwargs.ssm_mode", "identity", "their network has ssm_mode identity, the encoder's None"),
        ("*.architecture.arch_kwargs.d_state", 8, "their network has d_state 8, the encoder's 16"),
        ("*.patch_size", [32, 32, 34], "axis 2 must be a multiple of 4, not 34"),
    ],
    ids=str,
)
def test_plans_that_do_not_fit_an_encoder_are_refused(
    where, value, message, described, load_plans, make_encoder, assert_refused
):
    path, content = make_encoder(modality="ct"), dataset_json("CT")
    (described / "dataset.json").write_text(json.dumps(content))
    plans = change(derive(load_plans("isotropic"), path, content), where, value)
    (described / "Mine.json").write_text(json.dumps(plans))
    assert_refused(["--like", path, "--from", "Mine"], message)


def test_every_difference_is_named_at_once(load_plans, make_encoder):
    encoder = Encoder.read(make_encoder())
    plans = derive(load_plans("isotropic"), encoder.path, dataset_json())
    change(plans, "*.spacing", [3.0, 3.0, 3.0])
    change(plans, "*.use_mask_for_norm", [True])
    change(plans, "transpose_forward", [2, 1, 0])
    with pytest.raises(PlanError, match=r"exchange the axes .*; their spacing .*; they normalise within a mask"):
        check_like(encoder.description, plans, "3d_fullres", dataset_json())


def test_what_only_the_decoder_and_the_training_have_may_differ(load_plans, make_encoder):
    encoder = Encoder.read(make_encoder())
    plans = derive(load_plans("isotropic"), encoder.path, dataset_json())
    change(plans, "*.architecture.arch_kwargs.decoder_depths", 2)
    change(plans, "*.architecture.arch_kwargs.drop_path_rate", 0.5)
    change(plans, "*.spacing", [1.0, 1.2501, 1.5])
    check_like(encoder.description, plans, "3d_fullres", dataset_json())
