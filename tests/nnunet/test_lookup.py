"""Our trainers within nnU-Net's look-up, in this process; the external module on its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nnunetv2.run import run_training
from nnunetv2.utilities import find_objects

from medmamba.nnunet import names
from medmamba.nnunet.lookup import BrokenLookupError, UnknownTrainerError, find_trainer, trainers_resolvable
from medmamba.nnunet.trainers import TRAINERS


def broken(name: str) -> type:
    raise RuntimeError("operator torchvision::nms does not exist")


def test_our_names_need_no_look_up():
    assert len(TRAINERS) > 1000
    assert all(find_trainer(name, broken) is TRAINERS[name] for name in TRAINERS)


def test_other_names_are_left_to_nnunet():
    assert find_trainer("dict", lambda name: {"dict": dict}[name]) is dict


def test_an_unknown_name_lists_ours():
    with pytest.raises(UnknownTrainerError, match="no trainer 'nnUNetTrainerX'; medmamba has nnUNetTrainerVMUNet"):
        find_trainer("nnUNetTrainerX", find_objects.recursive_find_trainer_class_by_name)


def test_a_broken_look_up_is_told_apart_from_an_unknown_name():
    with pytest.raises(BrokenLookupError, match=r"torchvision::nms does not exist\); `medmamba doctor`"):
        find_trainer("nnUNetTrainer_1epoch", broken)


def test_within_the_context_nnunet_and_children_find_us_and_after_it_all_is_as_before(monkeypatch):
    monkeypatch.delenv(names.EXT_TRAINER, raising=False)
    original = find_objects.recursive_find_trainer_class_by_name
    with trainers_resolvable():
        assert (
            run_training.recursive_find_trainer_class_by_name("nnUNetTrainerVMUNet") is TRAINERS["nnUNetTrainerVMUNet"]
        )
        assert os.environ[names.EXT_TRAINER] == str(names.trainers_folder())
    assert run_training.recursive_find_trainer_class_by_name is original
    assert find_objects.recursive_find_trainer_class_by_name is original
    assert names.EXT_TRAINER not in os.environ


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "{ours}"), ("/a", "/a:{ours}"), ("/a:/b", "/a:/b:{ours}"), ("{ours}:/b", "{ours}:/b")],
    ids=str,
)
def test_folders_of_others_stay_in_the_variable(before, after):
    ours = str(names.trainers_folder())
    value = names.ext_trainer_value({names.EXT_TRAINER: before.format(ours=ours).replace(":", os.pathsep)})
    assert value == after.format(ours=ours).replace(":", os.pathsep)


def test_the_external_folder_holds_one_module_with_a_unique_name():
    assert [path.name for path in names.trainers_folder().glob("*.py")] == ["medmamba_trainers.py"]


def test_asking_the_external_module_for_a_foreign_name_imports_nothing_of_ours():
    code = """
        import sys
        import medmamba_trainers
        assert not hasattr(medmamba_trainers, "nnUNetTrainerSomebodyElses")
        assert not {"torch", "nnunetv2", "medmamba.nnunet.trainers"} & set(sys.modules)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(names.trainers_folder()), *sys.path])}
    script = "\n".join(line.strip() for line in code.splitlines())
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("module", ["medmamba.nnunet", "medmamba.nnunet.commands", "medmamba.nnunet.folders"])
def test_light_modules_stay_light(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'nnunetv2') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert child.stdout.strip() == "[]", child.stderr


def test_house_names_are_nnunets_style():
    assert names.trainer_name("vmunet") == "nnUNetTrainerVMUNet"
    assert names.plans_name("vmunet", "faithful", "identity") == "nnUNetMedMambaVMUNetFaithfulIdentityPlans"
    assert names.house_name("some_net") == "SomeNet"
    assert "__" not in names.plans_name("a__b", "_c_")


def test_the_external_folder_is_inside_the_package():
    import medmamba

    assert names.trainers_folder().is_relative_to(Path(medmamba.__file__).parent)


@pytest.mark.slow
def test_our_trainers_are_found_where_nnunets_own_look_up_is_broken(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = """
from nnunetv2.run import run_training
from medmamba.nnunet.lookup import trainers_resolvable
name = "nnUNetTrainerVMUNet"
with trainers_resolvable():
    assert run_training.recursive_find_trainer_class_by_name(name).__name__ == name
try:
    run_training.recursive_find_trainer_class_by_name(name)
except RuntimeError as error:
    assert "torchvision::nms" in str(error)
else:
    raise AssertionError("the look-up is not broken, so this test shows nothing")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
