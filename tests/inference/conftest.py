"""Small images for the tests of prediction; trained folders with tiny networks, and packages made from them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import locale
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import medmamba.inference
from medmamba.inference.model.package import sums_of

TESTS = Path(__file__).resolve().parents[1]
ODD_IMAGES = TESTS / "data" / "odd_images"
LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
#: Arguments that make every network of ours tiny.
TINY = {
    "mednext": {"base_features": 4, "depths": 1, "expansion": 2},
    "mednextmamba": {"base_features": 4, "depths": 1, "expansion": 2, "d_state": 2},
    "mhsvm": {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2},
    "msvmunet": {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2},
    "vmunet": {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2},
}


@dataclass
class TrainedFolder:
    """What a training left: a folder, and the networks as they were at its end.

    Attributes:
        folder: TRAINER__PLANS__CONFIGURATION.
        networks: fold -> network with deep supervision.
        checkpoints: fold -> content of its checkpoint.
    """

    folder: Path
    networks: dict[str, nn.Module] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, fold: str, name: str = "checkpoint_final.pth") -> Path:
        """Write the checkpoint of a fold as ``checkpoints`` has it."""
        path = self.folder / f"fold_{fold}" / name
        path.parent.mkdir(exist_ok=True)
        torch.save(self.checkpoints[fold], path)
        return path

    def change(self, file: str, change: Callable[[Any], Any]) -> None:
        """Change the content of a JSON file of the folder."""
        path = self.folder / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def tiny_plans(network: str, stages: int = 3) -> dict[str, Any]:
    """Plans with both configurations, of a stock network or of ours."""
    from medmamba.nnunet.architecture import architecture_block

    plans: dict[str, Any] = json.loads((TESTS / "data" / "plans" / "isotropic.json").read_text())
    for configuration in plans["configurations"].values():
        block = configuration["architecture"]
        arguments = block["arch_kwargs"]
        for key, value in arguments.items():
            if isinstance(value, list):
                arguments[key] = value[: stages - 1 if key == "n_conv_per_stage_decoder" else stages]
        arguments.update(n_stages=stages, features_per_stage=[4, 8, 8][:stages])
        configuration["patch_size"] = [8] * len(configuration["patch_size"])
        if network in ("ResidualEncoderUNet", "ResidualUNet"):
            block["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{network}"
            arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
        elif network != "PlainConvUNet":
            del arguments["features_per_stage"]
            configuration["architecture"] = architecture_block(network, block, TINY[network])
    return plans


def trained_folder(
    root: Path,
    network: str = "PlainConvUNet",
    configuration: str = "3d_fullres",
    folds: Sequence[str] = ("0",),
    labels: Mapping[str, Any] = LABELS,
    plans: Mapping[str, Any] | None = None,
) -> TrainedFolder:
    """A trained folder with random weights, written as nnU-Net writes it, with its numpy scalars."""
    from medmamba.nnunet.architecture import build_network

    plans = deepcopy(dict(plans)) if plans is not None else tiny_plans(network)
    dataset: dict[str, Any] = {
        "name": "Dataset901_Isotropic",
        "channel_names": {"0": "MRI"},
        "labels": dict(labels),
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "licence": "CC-BY-SA-4.0",
        "training": [{"image": "imagesTr/Jane_Doe.nii.gz", "label": "labelsTr/Jane_Doe.nii.gz"}],
    }
    heads = len(labels)
    if any(isinstance(value, list) for value in labels.values()):
        dataset["regions_class_order"] = [1, 2, 3]
        heads = 3
    trained = TrainedFolder(root / "Dataset901_Isotropic" / f"nnUNetTrainer__nnUNetPlans__{configuration}")
    trained.folder.mkdir(parents=True)
    (trained.folder / "plans.json").write_text(json.dumps(plans))
    (trained.folder / "dataset.json").write_text(json.dumps(dataset))
    (trained.folder / "dataset_fingerprint.json").write_text(json.dumps(FINGERPRINT))
    for number, fold in enumerate(folds):
        torch.manual_seed(number)
        built = build_network(plans["configurations"][configuration]["architecture"], 1, heads)
        trained.networks[fold] = built
        trained.checkpoints[fold] = {
            "network_weights": built.state_dict(),
            "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(1.0)], "lrs": [0.01]},
            "_best_ema": np.float64(0.25),
            "current_epoch": 1000,
            "init_args": {
                "plans": plans,
                "configuration": configuration,
                "fold": fold if fold == "all" else int(fold),
                "dataset_json": dataset,
                "device": torch.device("cpu"),
            },
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": tuple(range(3 if configuration.startswith("3d") else 2)),
        }
        trained.write(fold)
        validation = trained.folder / f"fold_{fold}" / "validation"
        validation.mkdir()
        (validation / "summary.json").write_text(json.dumps(SUMMARY))
    return trained


#: As nnU-Net's fingerprint extractor writes it, for two cases.
FINGERPRINT = {
    "spacings": [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]],
    "shapes_after_crop": [[30, 50, 40], [40, 40, 20]],
    "foreground_intensity_properties_per_channel": {
        "0": {
            "mean": 5.0,
            "median": 4.0,
            "std": 2.0,
            "min": 0.0,
            "max": 9.0,
            "percentile_99_5": 8,
            "percentile_00_5": 1,
        }
    },
    "median_relative_size_after_cropping": 1.0,
}
#: As nnU-Net's validation writes it; json.dumps writes the score of an absent label as NaN, as nnU-Net does.
SUMMARY = {
    "foreground_mean": {"Dice": 0.75, "IoU": 0.6},
    "mean": {"1": {"Dice": 0.75, "IoU": 0.6}, "2": {"Dice": float("nan"), "IoU": float("nan")}},
    "metric_per_case": [
        {
            "metrics": {},
            "prediction_file": "/home/doe/p/Jane_Doe.nii.gz",
            "reference_file": "/home/doe/r/Jane_Doe.nii.gz",
        }
    ],
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> TrainedFolder:
    """A stock network with two folds; do not write to it."""
    return trained_folder(tmp_path_factory.mktemp("trained"), folds=("0", "1"))


@pytest.fixture(scope="session")
def package(tmp_path_factory, trained) -> Path:
    """Its package; do not write to it."""
    from medmamba.inference.model import export_model

    out = tmp_path_factory.mktemp("package") / "model"
    export_model(trained.folder, out, licence="CC-BY-4.0", intended_use="Tests of medmamba.")
    return out


def sealed(folder: Path) -> None:
    """Write the SHA256SUMS of a changed package, as an attacker would."""
    files = [path for path in folder.iterdir() if path.name != "SHA256SUMS"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "SHA256SUMS").write_bytes(sums_of(sums))


def rebind(folder: Path) -> None:
    """Make the weights of a package belong to its changed model.json, and seal it: a new model, well made."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from medmamba.inference.model.tensors import to_bytes

    binding = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            fold = file.metadata()["medmamba_fold"]
        path.write_bytes(to_bytes(load_file(path), binding, fold))
    sealed(folder)


def changed(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the content of model.json and keep everything that can be kept in agreement with it."""
    path = folder / "model.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    rebind(folder)


@pytest.fixture(scope="session")
def make_trained() -> Callable[..., TrainedFolder]:
    """:func:`trained_folder`."""
    return trained_folder


@pytest.fixture(scope="session")
def plans_of() -> Callable[..., dict[str, Any]]:
    """:func:`tiny_plans`."""
    return tiny_plans


@pytest.fixture(scope="session")
def reseal() -> Callable[[Path], None]:
    """:func:`sealed`."""
    return sealed


@pytest.fixture(scope="session")
def change_model() -> Callable[..., None]:
    """:func:`changed`."""
    return changed


@pytest.fixture
def copied(package, tmp_path) -> Path:
    """A copy of the package that the test may change."""
    return Path(shutil.copytree(package, tmp_path / "copied"))


ODD_IMAGES = Path(__file__).resolve().parents[1] / "data" / "odd_images"
SHAPE_XYZ = (14, 12, 10)
FAKE_RUN = Path(__file__).with_name("fake_run.py")

WriteNifti = Callable[..., Path]
WriteImage = Callable[..., Path]


@pytest.fixture(scope="session")
def odd_images() -> Path:
    """Folder of small real files; see its README."""
    return ODD_IMAGES


@pytest.fixture(scope="session")
def write_nifti() -> WriteNifti:
    """Writes a plain NIfTI in mm that is read without a note; ``seed`` decides its voxels."""

    def write(path: Path, seed: int = 0, shape_xyz: tuple[int, ...] = (9, 10, 11), spacing: float = 2.0) -> Path:
        values = np.random.default_rng(seed).integers(-1000, 1000, shape_xyz).astype(np.int16)
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = (-20, 7, 100)
        image = nibabel.Nifti1Image(values, affine)
        image.header.set_xyzt_units("mm")
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, path)
        return path

    return write


@pytest.fixture(scope="session")
def ids_in() -> Callable[..., set[str]]:
    """Ids of messages in the code of a folder of medmamba.inference ("" for all), the catalogues left out."""

    def ids(folder: str, prefix: str = "MM-IO-") -> set[str]:
        found = set()
        for path in (Path(medmamba.inference.__path__[0]) / folder).rglob("*.py"):
            if path.name != "messages.py":
                values = [
                    node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
                ]
                found |= {value for value in values if isinstance(value, str) and value.startswith(prefix)}
        return found

    return ids


@pytest.fixture
def affine() -> np.ndarray:
    """(4, 4), turned about the patient's axis, no two axes alike."""
    return np.array([[1.2, -1.5, 0, -20], [0.9, 2.0, 0, 7.5], [0, 0, 3.0, 100], [0, 0, 0, 1]], np.float64)


@pytest.fixture
def write_image(affine: np.ndarray) -> WriteImage:
    """Writes a NIfTI with a bright box in noise: a path, and what differs from the usual."""

    def write(path: Path, seed: int = 0, at: np.ndarray | None = None, values: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if values is None:
            values = np.random.default_rng(seed).integers(-100, 0, SHAPE_XYZ).astype(np.int16)
            values[3:9, 4:8, 2 + seed % 3 : 7] = 100
        image = nibabel.Nifti1Image(values, affine if at is None else at)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, path)
        return path

    return write


@pytest.fixture
def mount_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a given size, e.g. "64k"."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here: no right to")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def _load_fake_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_run", FAKE_RUN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module ``fake_run``: ``Threshold`` predicts 1 where an image is bright."""
    return _load_fake_run()


@pytest.fixture
def five(tmp_path, write_image) -> Path:
    """A folder of five images, one of which is junk."""
    for k in range(4):
        write_image(tmp_path / "in" / f"case_{k}.nii.gz", seed=k)
    (tmp_path / "in" / "case_9.nii.gz").write_bytes(b"this is no image at all" * 20)
    return tmp_path / "in"


@pytest.fixture
def write_dicom() -> Callable[[Path], None]:
    """Writes a series of eight slices into a new folder."""

    def write(folder: Path) -> None:
        import SimpleITK

        before = locale.setlocale(locale.LC_CTYPE)
        folder.mkdir(parents=True)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        for k in range(8):
            values = np.full((12, 14), 100 * (k % 2), np.int16)
            image = SimpleITK.GetImageFromArray(values)
            image.SetSpacing([1.5, 2.0])
            tags = {
                "0008|0008": "DERIVED\\SECONDARY",
                "0008|0060": "CT",
                "0020|000d": "1.2.3",
                "0020|000e": "1.2.3.4",
                "0020|0013": str(k),
                "0020|0032": f"-10\\20\\{3.0 * k}",
                "0020|0037": "1\\0\\0\\0\\1\\0",
            }
            for tag, value in tags.items():
                image.SetMetaData(tag, value)
            writer.SetFileName(str(folder / f"slice{k}.dcm"))
            writer.Execute(image)
        locale.setlocale(locale.LC_CTYPE, before)  # which the writer turns into C

    return write
