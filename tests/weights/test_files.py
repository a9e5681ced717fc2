"""Reading weights from files: wrappers, formats, and no code."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba.weights import WeightsError, read_checkpoint, read_training

WEIGHTS = {"layers.0.weight": torch.arange(6.0).view(2, 3), "layers.0.bias": torch.zeros(2)}


def assert_same(found) -> None:
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items())


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "network_weights", None])
def test_the_wrappers_of_trainings_are_taken_off(tmp_path, wrapper):
    content = WEIGHTS if wrapper is None else {"epoch": 3, wrapper: WEIGHTS, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "weights.pth")
    assert_same(read_checkpoint(tmp_path / "weights.pth"))


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    found = read_checkpoint(tmp_path / "weights.safetensors")
    assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items())
    (tmp_path / "weights.safetensors").write_bytes(b"not what it says")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        read_checkpoint(tmp_path / "weights.safetensors")


def test_settings_and_numbers_beside_the_weights_do_no_harm(tmp_path, monkeypatch):
    """VMamba keeps a yacs CfgNode, VM-UNet the mean loss as a numpy scalar; neither package is needed to read them."""
    module = types.ModuleType("yacs.config")
    exec("class CfgNode(dict):\n    pass", module.__dict__)
    module.CfgNode.__module__ = "yacs.config"
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    settings = module.CfgNode(MODEL=module.CfgNode(DEPTHS=[2, 2, 8, 2]))
    settings.frozen = True
    torch.save({"model": WEIGHTS, "config": settings, "min_loss": np.mean([0.5, 0.25])}, tmp_path / "weights.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    assert_same(read_checkpoint(tmp_path / "weights.pth"))
    assert "yacs.config" not in sys.modules


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": WEIGHTS, "config": Malicious(tmp_path / "was here")}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights\.pth is not weights alone: reading it would run code"):
        read_checkpoint(tmp_path / "weights.pth")
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "loss": 0.5}, r"holds the keys 'epoch', 'loss' and no weights"),
        ({"model": {}}, "and no weights"),
        ({"model": {"a": 1}}, "and no weights"),
        ([torch.zeros(1)], "holds a list and no weights"),
        ({}, r"holds the keys \(none\)"),
    ],
    ids=str,
)
def test_a_file_without_weights_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut off"], ids=str)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        read_checkpoint(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors", "."])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(WeightsError, match="is no file; give a checkpoint"):
        read_checkpoint(tmp_path / name)


def test_what_lies_beside_the_weights_of_a_training_is_read(tmp_path):
    torch.save({"network_weights": WEIGHTS, "trainer_name": "T", "_best_ema": np.float64(0.5)}, tmp_path / "w.pth")
    content = read_training(tmp_path / "w.pth")
    assert list(content) == ["network_weights", "trainer_name", "_best_ema"]
    assert content["trainer_name"] == "T"
    assert all(torch.equal(content["network_weights"][key], tensor) for key, tensor in WEIGHTS.items())


@pytest.mark.parametrize("in_place", [False, True])
def test_numpy_scalars_beside_the_weights_of_a_training_are_numbers(tmp_path, in_place):
    values = [np.float64(0.1), np.float32(0.1), np.float16(2), np.int64(-3), np.int32(7), np.uint8(255), np.bool_(True)]
    swapped = np.dtype(">f8").type(0.25)
    torch.save({"network_weights": WEIGHTS, "logging": [*values, swapped]}, tmp_path / "w.pth")
    content = read_training(tmp_path / "w.pth", in_place=in_place)
    assert content["logging"] == [value.item() for value in values] + [0.25]
    assert all(type(number) in (float, int, bool) for number in content["logging"])
    assert all(torch.equal(content["network_weights"][key], tensor) for key, tensor in WEIGHTS.items())


def test_a_numpy_scalar_that_is_no_plain_number_is_nothing(tmp_path):
    torch.save({"network_weights": WEIGHTS, "when": np.datetime64("2024-01-01"), "z": np.complex128(1)}, tmp_path / "w")
    content = read_training(tmp_path / "w")
    assert not isinstance(content["when"], int | float | np.generic)
    assert not isinstance(content["z"], int | float | np.generic)


@pytest.mark.parametrize(
    "content", [{"model": WEIGHTS}, {"network_weights": {}}, {"network_weights": [1]}, []], ids=str
)
def test_a_file_that_no_training_wrote_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="has no network_weights"):
        read_training(tmp_path / "w.pth")
