"""A small preprocessed dataset, stock plans and folders for the tests of the nnU-Net room."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from importlib.metadata import distribution
from io import StringIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
DATASET = "Dataset901_Isotropic"
CASES = ("hippocampus_148", "hippocampus_149", "hippocampus_320")
#: A network of a few thousand parameters with everything the real one has.
TINY = {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2, "routes": ["dhw", "dhw:reverse"]}

# Loaded by every Python of a command, its child processes too.
BLOCKED_TRAINERS = """
import sys
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(("medmamba.nnunet", "medmamba_plans", "medmamba_trainers")):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker)
"""


class Folder:
    """nnU-Net's three folders and two ways to run its console commands on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw, self.preprocessed, self.results = (root / name for name in ("raw", "preprocessed", "results"))
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True)

    def add_dataset(
        self,
        raw: Path,
        plans: Iterable[Mapping[str, Any]],
        dataset_json: Mapping[str, Any] | None = None,
        configurations: tuple[str, ...] = ("3d_fullres",),
    ) -> Path:
        """Preprocess the cases of ``raw`` by the first of the plans, write all of them, and return the folder."""
        plans = list(plans)
        target = self.preprocessed / DATASET
        if dataset_json is None:
            dataset_json = json.loads((raw / "dataset.json").read_text())
        preprocess(target, raw, plans[0], dataset_json, configurations)
        for content in plans:
            (target / f"{content['plans_name']}.json").write_text(json.dumps(content))
        return target

    def images(self, raw: Path, *cases: str) -> Path:
        """A folder with the images of these cases, to be predicted."""
        images = self.root / "images"
        images.mkdir()
        for case in cases:
            shutil.copy(raw / "imagesTr" / f"{case}_0000.nii.gz", images)
        return images

    def start(self, *command: str, startup: str | None = None, trainers: str = "found") -> subprocess.Popen[str]:
        """Start a command as a process.

        Args:
            command: a command of the environment under test and its arguments.
            startup: code that each of its Pythons runs first.
            trainers: ``found`` through ``nnUNet_extTrainer``; ``unknown`` to nnU-Net; ``blocked``, which cannot even
                be imported.
        """
        environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
        environment |= self.variables(trainers) | for_planning(command[0])
        if trainers == "blocked":
            startup = BLOCKED_TRAINERS + (startup or "")
        if startup is not None:
            hook = self.root / f"startup{len(list(self.root.glob('startup*')))}"
            hook.mkdir()
            (hook / "sitecustomize.py").write_text(startup)
            environment["PYTHONPATH"] = os.pathsep.join([str(hook), *sys.path])
        program = Path(sysconfig.get_path("scripts")) / command[0]
        arguments = [str(program if program.exists() else command[0]), *map(str, command[1:])]
        return subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root
        )

    def run(self, *command: str, startup: str | None = None, trainers: str = "found") -> str:
        """Run a command as a process (see :meth:`start`) and return what it printed; it must succeed."""
        process = self.start(*command, startup=startup, trainers=trainers)
        printed, _ = process.communicate(timeout=900)
        assert process.returncode == 0, f"{' '.join(map(str, command))}\n{printed[-8000:]}"
        return printed

    def call(self, command: str, *arguments: object) -> None:
        """Run the entry point of a console command in this process, with threads for its child processes.

        Every process that nnU-Net spawns would import torch again, some six seconds each.
        """
        scripts = {e.name: e for e in distribution("nnunetv2").entry_points if e.group == "console_scripts"}
        with self._here(command) as patch:
            patch.setattr(sys, "argv", [command, *map(str, arguments)])
            scripts[command].load()()

    def medmamba(self, *arguments: object) -> str:
        """Run a command of ours in this process, as :meth:`call` does, and return what it printed."""
        from medmamba.cli import main

        with self._here("medmamba"), redirect_stdout(StringIO()) as printed:
            assert main([*map(str, arguments)]) == 0, printed.getvalue()[-8000:]
        return printed.getvalue()

    @contextmanager
    def _here(self, command: str) -> Iterator[pytest.MonkeyPatch]:
        """This process as that of a command."""
        with pytest.MonkeyPatch.context() as patch, threads_for_processes():
            for name, value in (self.variables() | for_planning(command)).items():
                patch.setenv(name, value)
            patch.chdir(self.root)
            patch.setattr("torch.set_num_threads", lambda number: None)
            yield patch

    def variables(self, trainers: str = "found") -> dict[str, str]:
        """Environment of a command; see :meth:`start`."""
        from medmamba.nnunet.names import EXT_TRAINER, trainers_folder

        variables = {f"nnUNet_{name}": str(self.root / name) for name in ("raw", "preprocessed", "results")}
        variables |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0"}
        return variables if trainers != "found" else {**variables, EXT_TRAINER: str(trainers_folder())}


def for_planning(command: str) -> dict[str, str]:
    """nnU-Net's planner stops where no process makes batches."""
    return {"nnUNet_n_proc_DA": "1"} if "plan" in command else {}


@contextmanager
def threads_for_processes() -> Iterator[None]:
    """Within this context nnU-Net's pools of spawned processes are pools of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method=None: SimpleNamespace(Pool=ThreadPool))
        yield


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory) -> Callable[[], Folder]:
    """Makes empty folders of nnU-Net for console commands."""
    return lambda: Folder(tmp_path_factory.mktemp("nnunet"))


@pytest.fixture(scope="module")
def folder(make_folder) -> Folder:
    """Folders of nnU-Net that the tests of a module share."""
    return make_folder()


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


@pytest.fixture(scope="session")
def make_tiny() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Plans of ours from stock plans: :func:`tiny`."""
    return tiny


@pytest.fixture(scope="session")
def plans_to_train(load_plans) -> Callable[..., list[dict[str, Any]]]:
    """Tiny plans of ours with a schedule, one for each name: trainings of the small dataset in processes."""

    def make(schedule: Mapping[str, Any], *names: str) -> list[dict[str, Any]]:
        stock = load_plans("isotropic")
        stock["configurations"]["3d_fullres"].update(patch_size=[16, 16, 16], batch_size=2)
        plans = tiny(stock)
        plans["medmamba"]["schedule"] = dict(schedule)
        return [{**plans, "plans_name": name} for name in names]

    return make


@pytest.fixture
def tiny_plans(stock_plans) -> dict[str, Any]:
    """Plans of ours for the small dataset: a tiny VM-UNet and one epoch of two iterations."""
    return tiny(stock_plans)


def tiny(stock_plans: Mapping[str, Any]) -> dict[str, Any]:
    """Plans of ours from stock plans: a tiny VM-UNet in every configuration, and one epoch of two iterations."""
    from medmamba.nnunet.architecture import architecture_block

    plans = deepcopy(dict(stock_plans))
    plans["plans_name"] = "nnUNetMedMambaVMUNetPlans"
    for configuration in plans["configurations"].values():
        if "architecture" not in configuration:  # it inherits one
            continue
        options = {**TINY, **({} if len(configuration["patch_size"]) == 3 else {"routes": ["hwd", "hwd:reverse"]})}
        configuration["architecture"] = architecture_block("vmunet", configuration["architecture"], options)
    schedule = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    plans["medmamba"] = {"network": "vmunet", "schedule": schedule, "note": "kept"}
    return plans


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory, raw_cases, load_plans) -> Path:
    """``nnUNet_preprocessed`` with three real cases, preprocessed by nnU-Net in this process; do not write to it."""
    root = tmp_path_factory.mktemp("nnUNet_preprocessed")
    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    preprocess(root / DATASET, raw_cases, load_plans("isotropic"), dataset_json)
    return root


def preprocess(
    target: Path,
    raw: Path,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configurations: tuple[str, ...] = ("3d_fullres",),
) -> None:
    """Preprocess the cases of ``raw`` as nnU-Net does, in this process, into the new dataset folder ``target``."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(deepcopy(dict(plans)))
    shutil.copytree(raw / "labelsTr", target / "gt_segmentations")
    for name in configurations:
        configuration = manager.get_configuration(name)
        data = target / configuration.data_identifier
        data.mkdir()
        for case in CASES:
            image, label = raw / "imagesTr" / f"{case}_0000.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"
            configuration.preprocessor_class(verbose=False).run_case_save(
                str(data / case), [str(image)], str(label), manager, configuration, dict(dataset_json)
            )
    (target / "dataset.json").write_text(json.dumps(dataset_json))
    (target / "dataset_fingerprint.json").write_text("{}")
    (target / "splits_final.json").write_text(json.dumps([{"train": CASES[:2], "val": CASES[2:]}]))


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

    def make(
        name: str,
        plans: dict[str, Any],
        configuration: str = "3d_fullres",
        dataset_json: dict[str, Any] | None = None,
    ) -> Any:
        from medmamba.nnunet.trainers import TRAINERS

        if dataset_json is None:
            dataset_json = json.loads((raw_cases / "dataset.json").read_text())
        plans = {**plans, "continue_training": False}
        return TRAINERS[name](plans, configuration, 0, dataset_json, torch.device("cpu"))

    return make
