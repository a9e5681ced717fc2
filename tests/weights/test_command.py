"""``medmamba import-weights``, and nnU-Net's own reading of what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from medmamba.cli import main
from medmamba.nnunet.architecture import architecture_block, build_network

PLANS = Path(__file__).resolve().parents[1] / "data" / "plans"
DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "front": 1, "back": 2},
    "file_ending": ".nii",
}


@pytest.fixture
def dataset(tmp_path, monkeypatch, published) -> Path:
    """A preprocessed dataset with plans that name a small faithful VM-UNet of the published depth."""
    plans = json.loads((PLANS / "images.json").read_text())
    options = {**published.ours["vmunet"], "auxiliary_heads": True}
    configuration = plans["configurations"]["2d"]
    configuration["architecture"] = architecture_block("vmunet", configuration["architecture"], options)
    plans["plans_name"] = "smallPlans"
    target = tmp_path / "nnUNet_preprocessed" / "Dataset901_Images"
    target.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_preprocessed", str(target.parent))
    (target / "smallPlans.json").write_text(json.dumps(plans))
    (target / "nnUNetPlans.json").write_text((PLANS / "images.json").read_text())
    (target / "dataset.json").write_text(json.dumps(DATASET_JSON))
    return target


@pytest.fixture
def checkpoint(tmp_path, published) -> Path:
    path = tmp_path / "vmunet.pth"
    torch.save(published.build("vmunet").state_dict(), path)
    return path


def test_stock_nnunet_loads_what_is_written(dataset, checkpoint, tmp_path, capsys, published):
    out = tmp_path / "out.pth"
    arguments = ["-d", "901", "-p", "smallPlans", "-c", "2d", "-o", str(out)]
    assert main(["import-weights", str(checkpoint), *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("VM-UNet (widths 8, 16, 32, 64; blocks 1, 2, 1, 2) -> vmunet\n")
    assert "1  image channels: 3 summed, shared by 1: encoder.embed.body.0.proj.weight" in printed
    assert f"wrote {out}" in printed
    assert f"nnUNetv2_train 901 2d 0 -p smallPlans -pretrained_weights {out}" in printed
    configuration = json.loads((dataset / "smallPlans.json").read_text())["configurations"]["2d"]
    network = build_network(configuration["architecture"], 1, 3)
    load_pretrained_weights(network, str(out))
    network = network.double().eval()
    published_network = published.build("vmunet")
    with torch.no_grad():
        x = torch.randn(1, 1, 32, 64, dtype=torch.float64)
        features = network.encoder(x)
        expected = published_network.vmunet.features(x.expand(-1, 3, -1, -1))
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs.movedim(-1, 1), rtol=1e-4, atol=1e-4)  # the file is in float32


def test_what_was_not_published_is_drawn_with_one_seed(dataset, checkpoint, tmp_path):
    states = []
    for name in ("first.pth", "second.pth"):
        arguments = ["-d", "901", "-p", "smallPlans", "-c", "2d", "-o", str(tmp_path / name)]
        assert main(["import-weights", str(checkpoint), *arguments]) == 0
        states.append(torch.load(tmp_path / name, weights_only=True)["network_weights"])
        torch.rand(3)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(".seg_layers." in key for key in states[0])


def test_a_plans_file_alone_wants_channels_and_classes(dataset, checkpoint, tmp_path, capsys):
    plans = tmp_path / "elsewhere.json"
    plans.write_text((dataset / "smallPlans.json").read_text())
    arguments = [str(checkpoint), "-p", str(plans), "-c", "2d", "-o", str(tmp_path / "out.pth")]
    assert main(["import-weights", *arguments]) == 2
    assert "give --input-channels and --num-classes" in capsys.readouterr().err
    assert main(["import-weights", *arguments, "--input-channels", "2", "--num-classes", "2"]) == 0
    assert "loaded    182" in capsys.readouterr().out  # the head too: two classes were published


def test_an_encoder_and_its_mirror_image(dataset, tmp_path, published, capsys):
    torch.save({"model": published.build("vmamba").state_dict()}, tmp_path / "vmamba.pth")
    arguments = ["-d", "901", "-p", "smallPlans", "-c", "2d", "-o", str(tmp_path / "out.pth"), "--mirror-decoder"]
    assert main(["import-weights", str(tmp_path / "vmamba.pth"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "a decoder, and the checkpoint is an encoder: decoder.ups.0.body.0.expand.weight" in printed
    assert "the classifier's, of which a segmentation network has no counterpart" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-d 901 -p nnUNetPlans -c 2d", "nnUNetPlans name no network of medmamba; make such plans with `medmamba plan"),
        ("-d 901 -p otherPlans -c 2d", "no plans otherPlans in"),
        ("-d 901 -p smallPlans -c 3d_fullres", "have no configuration '3d_fullres'; known: 2d"),
        ("-d 902 -p smallPlans -c 2d", "no dataset '902'"),
        ("-p smallPlans -c 2d", "name a dataset and its plans, -d 4 -p PLANS, or give a plans file"),
        ("-d 901 -p smallPlans -c 2d --num-classes 0", "must be 1 or more, not 1 and 0"),
        ("-d 901 -p smallPlans -c 2d --mirror-decoder", "leave mirror_decoder .--mirror-decoder. out"),
    ],
)
def test_wrong_use_ends_with_one_line(dataset, checkpoint, tmp_path, capsys, arguments, message):
    out = tmp_path / "out.pth"
    assert main(["import-weights", str(checkpoint), *arguments.split(), "-o", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("medmamba import-weights: ")
    assert message.replace(".--mirror-decoder.", "(--mirror-decoder)") in error[0]
    assert not out.exists()


def test_a_missing_folder_and_a_missing_checkpoint_are_named(dataset, checkpoint, tmp_path, capsys):
    arguments = ["-d", "901", "-p", "smallPlans", "-c", "2d", "-o"]
    assert main(["import-weights", str(checkpoint), *arguments, str(tmp_path / "nowhere" / "out.pth")]) == 2
    assert "nowhere is not a folder; create it or choose another -o" in capsys.readouterr().err
    assert main(["import-weights", str(tmp_path / "none.pth"), *arguments, str(tmp_path / "out.pth")]) == 2
    assert "none.pth is no file" in capsys.readouterr().err


def test_weights_that_do_not_fit_leave_no_file(dataset, checkpoint, tmp_path, capsys):
    plans = json.loads((dataset / "smallPlans.json").read_text())
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["depths"] = 3
    (dataset / "smallPlans.json").write_text(json.dumps(plans))
    arguments = [str(checkpoint), "-d", "901", "-p", "smallPlans", "-c", "2d", "-o", str(tmp_path / "out.pth")]
    assert main(["import-weights", *arguments]) == 2
    assert "would be loaded in part only" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
    assert main(["import-weights", *arguments, "--allow-partial"]) == 0
    assert "not in the checkpoint: encoder.stages.0.body.1.norm.weight ..." in capsys.readouterr().out
