"""``medmamba doctor``: what is broken is found, and every failing line has a remedy."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from medmamba.cli import main
from medmamba.nnunet import doctor
from medmamba.nnunet.folders import FOLDERS
from medmamba.nnunet.names import EXT_TRAINER, ext_trainer_value
from medmamba_kernels import testing
from medmamba_kernels.backends import BACKENDS


@pytest.mark.parametrize(
    ("package", "version", "is_supported"),
    [
        ("torch", "2.8.0", True),
        ("torch", "2.9.1+cpu", False),
        ("torch", "2.10.0", True),
        ("torch", "2.7.1", False),
        ("nnunetv2", "2.8", True),
        ("nnunetv2", "2.7.0", False),
        ("nnunetv2", "3.0.0", False),
        ("numpy", "1.0", True),
    ],
)
def test_versions_that_are_supported(package, version, is_supported):
    assert (doctor.unsupported(package, version) is None) == is_supported


def test_a_missing_package_fails_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    (check,) = doctor.check_versions()
    assert (check.status, check.remedy) == ("fail", "pip install no-such-package")


@pytest.mark.parametrize("variable", FOLDERS)
def test_an_unset_folder_is_a_note(variable, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    check = doctor.check_folder(variable)
    assert (check.status, check.remedy) == ("note", f"export {variable}=/some/folder")


@pytest.mark.parametrize("variable", FOLDERS)
def test_a_missing_folder_fails(variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, str(tmp_path / "missing"))
    check = doctor.check_folder(variable)
    assert check.status == "fail"
    assert check.remedy.startswith(f"mkdir -p {tmp_path / 'missing'}")


@pytest.mark.parametrize(
    ("variable", "status"), [("nnUNet_raw", "ok"), ("nnUNet_preprocessed", "fail"), ("nnUNet_results", "fail")]
)
def test_only_raw_data_may_be_read_only(variable, status, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, str(tmp_path))
    assert doctor.check_folder(variable).status == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    check = doctor.check_folder(variable)
    assert check.status == status
    assert bool(check.remedy) == (status == "fail")


def test_every_backend_is_tested_against_the_reference():
    checks = list(doctor.check_backends())
    assert all(check.status in ("ok", "note") for check in checks), checks
    assert {name for name in BACKENDS if any(f"backend {name} on cpu" in check.name for check in checks)} == set(
        BACKENDS
    )


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_backend_with_wrong_numbers_fails(error, monkeypatch):
    monkeypatch.setattr(testing, "self_test", lambda name, device: testing.SelfTest(error, False))
    check = next(check for check in doctor.check_backends() if "backend torch on cpu" in check.name)
    assert check.status == "fail"
    assert "MEDMAMBA_BACKEND" in check.remedy


def test_a_backend_that_crashes_fails_and_the_others_go_on(monkeypatch):
    def self_test(name, device):
        raise RuntimeError("no such\nsymbol")

    monkeypatch.setattr(testing, "self_test", self_test)
    checks = list(doctor.check_backends())
    check = next(check for check in checks if "backend torch on cpu" in check.name)
    assert (check.status, check.detail) == ("fail", "RuntimeError: no such symbol")
    assert checks[-1] is not check


def test_a_backend_that_cannot_run_here_is_a_note_with_its_reason(monkeypatch):
    module = SimpleNamespace(unavailable_reason=lambda device: "no compiler")
    monkeypatch.setitem(BACKENDS, "other", module)
    monkeypatch.setattr(testing, "self_test", lambda name, device: testing.SelfTest(0.0, True))
    (check,) = [check for check in doctor.check_backends() if "other" in check.name]
    assert (check.status, check.detail) == ("note", "not available: no compiler")


def test_a_torchvision_that_does_not_match_is_found_and_the_remedy_named(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (check,) = doctor.check_torchvision()
    assert check.status == "fail"
    assert "torchvision::nms does not exist" in check.detail
    assert "--force-reinstall torch torchvision" in check.remedy


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_without_what_the_search_imports_the_look_up_is_a_note(missing, monkeypatch):
    find = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == missing else find(name))
    (fits,) = doctor.check_torchvision()
    _, look_up = doctor.check_lookup()
    assert [check.status for check in (fits, look_up)] == ["note", "note"]
    assert f"not installed: {missing};" in fits.detail
    assert missing in look_up.detail


def test_a_look_up_that_fails_in_the_child_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "_here", lambda name: {"result": "medmamba.nnunet.trainers"})
    monkeypatch.setattr(doctor, "_LOOKUP", "raise RuntimeError('broken {name}')")
    variable, here, child = doctor.check_lookup()
    assert (here.status, child.status) == ("ok", "fail")
    assert "broken nnUNetTrainerVMUNet" in child.detail
    assert child.remedy
    assert variable.name == EXT_TRAINER


@pytest.mark.parametrize("is_set", [True, False])
def test_the_variable_is_looked_at(is_set, monkeypatch):
    monkeypatch.delenv(EXT_TRAINER, raising=False)
    if is_set:
        monkeypatch.setenv(EXT_TRAINER, ext_trainer_value())
    monkeypatch.setattr(doctor, "_here", lambda name: {})
    monkeypatch.setattr(doctor, "_in_child", lambda code: {})
    check = next(iter(doctor.check_lookup()))
    assert check.status == ("ok" if is_set else "note")


def test_a_backend_forced_by_the_environment_that_does_not_exist_fails(monkeypatch):
    monkeypatch.setenv("MEDMAMBA_BACKEND", "nothing")
    monkeypatch.setattr(testing, "self_test", lambda name, device: testing.SelfTest(0.0, True))
    check = next(check for check in doctor.check_backends() if check.name == "scan on cpu")
    assert check.status == "fail"
    assert "unset MEDMAMBA_BACKEND" in check.remedy


def test_a_check_that_breaks_is_a_failing_line_and_the_others_go_on(monkeypatch):
    def check_backends():
        raise ImportError("libtorch.so is missing")

    monkeypatch.setattr(doctor, "check_backends", check_backends)
    for name in ("check_versions", "check_torchvision", "check_lookup"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    broken, *folders = doctor.examine()
    assert (broken.status, broken.name) == ("fail", "check backends")
    assert broken.detail == "ImportError: libtorch.so is missing"
    assert broken.remedy
    assert len(folders) == len(FOLDERS)


@pytest.mark.parametrize(("status", "exit_code"), [("ok", 0), ("note", 0), ("fail", 1)])
def test_the_exit_code_is_1_when_a_check_fails(status, exit_code, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "examine", lambda: iter([doctor.Check("ok", "a", "b"), doctor.Check(status, "x", "y", "z")])
    )
    assert main(["doctor"]) == exit_code
    out = capsys.readouterr().out
    assert "-> z" in out
    assert ("1 of 2 checks failed" in out) == (exit_code == 1)


# `medmamba doctor` of docs/getting-started/install.md does the same in every run of the tests.
@pytest.mark.nightly
def test_this_installation_is_sound(capsys, monkeypatch):
    for variable in (*FOLDERS, EXT_TRAINER):
        monkeypatch.delenv(variable, raising=False)
    assert main(["doctor"]) == 0, capsys.readouterr().out
