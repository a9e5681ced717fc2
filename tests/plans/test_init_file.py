"""The file of initial weights for a fine-tuning, as stock nnU-Net reads it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from medmamba.cli import main
from medmamba.networks import NETWORKS
from medmamba.nnunet.architecture import build_network
from medmamba.weights import WeightsError, read_encoder
from medmamba_plans.init_file import write_init_file
from medmamba_plans.like import Encoder

LABELS = {"background": 0, "front": 1, "back": 2}


@pytest.fixture
def described(dataset) -> Path:
    """The preprocessed dataset with its dataset.json: one channel of MRI, three classes."""
    write_dataset_json(dataset, 1)
    return dataset


def write_dataset_json(folder: Path, channels: int) -> None:
    names = {str(i): f"T{i}" for i in range(channels)}
    content = {"channel_names": names, "labels": LABELS, "file_ending": ".nii.gz", "numTraining": 8}
    (folder / "dataset.json").write_text(json.dumps(content))


def plan(folder: Path, encoder: Path, *arguments: str) -> Path:
    """Plan like an encoder, under the name Mine, and give the file of weights."""
    assert main(["plan", "-d", "901", "--like", str(encoder), "--plans-name", "Mine", *arguments]) == 0
    return folder / "Mine_init.pth"


def loaded(folder: Path, weights: Path, channels: int = 1) -> torch.nn.Module:
    """A fresh network of the plans with the weights, by nnU-Net's own function."""
    block = json.loads((folder / "Mine.json").read_text())["configurations"]["3d_fullres"]["architecture"]
    network = build_network(block, channels, len(LABELS))
    load_pretrained_weights(network, str(weights))
    return network


@pytest.mark.parametrize("geometry", ["native", "faithful"])
@pytest.mark.parametrize("network", NETWORKS)
def test_stock_nnunet_loads_every_tensor_of_every_encoder(network, geometry, described, make_encoder, capsys):
    path = make_encoder(network, geometry)
    weights = plan(described, path)
    _, expected = read_encoder(path)
    assert f"loaded {len(expected):6d} tensors as they are\n  adapted     0" in capsys.readouterr().out
    found = loaded(described, weights).encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_seed_decides_the_decoder_and_nothing_else(described, make_encoder):
    path, states = make_encoder(), {}
    for name, seed in (("first", "0"), ("again", "0"), ("other", "7")):
        torch.rand(3)
        plan(described, path, "--seed", seed, "--init", str(described / f"{name}.pth"))
        states[name] = torch.load(described / f"{name}.pth", weights_only=True)["network_weights"]
    default = torch.load(plan(described, path), weights_only=True)["network_weights"]
    for same in (states["again"], default):
        assert all(torch.equal(value, same[key]) for key, value in states["first"].items())
    differing = {key for key, value in states["first"].items() if not torch.equal(value, states["other"][key])}
    assert differing
    assert not any(key.startswith("encoder.") for key in differing)
    assert any(".seg_layers." in key for key in differing)


def test_the_random_state_of_the_caller_stays(described, make_encoder):
    path = make_encoder()
    plan(described, path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    plan(described, path)
    assert torch.equal(torch.rand(1), expected)


def test_the_file_is_plain_and_on_the_cpu(described, make_encoder):
    path = make_encoder()
    content = torch.load(plan(described, path), weights_only=True)
    assert {(value.device.type, value.dtype) for value in content["network_weights"].values()} == {
        ("cpu", torch.float32)
    }
    facts = content["medmamba"]
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["plans"], facts["configuration"], facts["seed"]) == ("Mine", "3d_fullres", 0)
    assert facts["encoder"] == Encoder.read(path).as_json()


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_share_the_first_convolution(channels, described, make_encoder, capsys):
    write_dataset_json(described, channels)
    path = make_encoder()
    weights = plan(described, path)
    _, expected = read_encoder(path)
    assert f"image channels: 1 summed, shared by {channels}: encoder.stem.conv.weight" in capsys.readouterr().out
    found = loaded(described, weights, channels).encoder.state_dict()
    stem = expected.pop("stem.conv.weight")
    torch.testing.assert_close(found["stem.conv.weight"], (stem / channels).expand(-1, channels, -1, -1, -1))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_plans_that_fit_are_used_again_for_another_encoder(described, make_encoder, capsys):
    first, second = make_encoder(), make_encoder(seed=1, name="second")
    weights = plan(described, first)
    before = {path.name: path.read_bytes() for path in described.iterdir()}
    other = described.parent / "second start.pth"
    arguments = ["plan", "-d", "901", "--like", str(second), "--from", "Mine"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "Mine_init.pth holds the encoder" in capsys.readouterr().err
    assert main([*arguments, "--init", str(other)]) == 0
    out = capsys.readouterr().out
    assert "-p Mine -pretrained_weights '" in out
    assert "nnUNetTrainerVMUNet_Finetune" in out
    assert {path.name: path.read_bytes() for path in described.iterdir()} == before
    for encoder, file in ((first, weights), (second, other)):
        found = loaded(described, file).encoder.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in read_encoder(encoder)[1].items())


@pytest.mark.parametrize("content", [b"", b"somebody's notes", None], ids=["empty", "text", "checkpoint"])
def test_a_file_that_is_not_ours_is_not_replaced(content, described, make_encoder, capsys):
    path = described / "Mine_init.pth"
    if content is None:
        torch.save({"network_weights": {"a": torch.zeros(1)}}, path)
    else:
        path.write_bytes(content)
    before = {path.name: path.read_bytes() for path in described.iterdir()}
    assert main(["plan", "-d", "901", "--like", str(make_encoder()), "--plans-name", "Mine"]) == 2
    assert "Mine_init.pth holds something else, not encoder.safetensors; name another file" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in described.iterdir()} == before


def test_an_encoder_that_does_not_fit_the_network_leaves_no_file(described, make_encoder):
    encoder = Encoder.read(make_encoder())
    plan(described, encoder.path)
    plans = json.loads((described / "Mine.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["depths"] = 2
    content = json.loads((described / "dataset.json").read_text())
    with pytest.raises(WeightsError, match="is missing; "):
        write_init_file(described / "new.pth", encoder, plans, "3d_fullres", content)
    assert not (described / "new.pth").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(described, make_encoder):
    """The operating system refuses to write: a limit on the size of files of a child process."""
    path = make_encoder()
    before = {path.name: path.read_bytes() for path in described.iterdir()}
    code = f"""
        import resource, signal, sys
        sys.path[:0] = {sys.path!r}
        from medmamba.cli import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        sys.exit(main(["plan", "-d", "901", "--like", {str(path)!r}, "--plans-name", "Mine"]))
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert child.returncode == 2, child.stderr
    assert "Mine_init.pth cannot be written (" in child.stderr.splitlines()[-1]
    assert "Traceback" not in child.stderr
    assert {path.name: path.read_bytes() for path in described.iterdir()} == before
