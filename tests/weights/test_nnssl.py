"""An encoder with nnssl's block: the block alone must be enough to build, find and load."""

from __future__ import annotations

import json
import pydoc

import pytest
import torch

from medmamba.cli import main
from medmamba.networks import NETWORKS, create_network
from medmamba.weights import EncoderDescription, WeightsError, read_encoder, write_encoder, write_nnssl_checkpoint

STRIDES = {"native": [[1, 1, 1], [2, 2, 2], [1, 2, 2]], "faithful": [[1, 1, 1], [2, 4, 4], [2, 2, 2]]}


@pytest.fixture
def encoder(tmp_path):
    """Writes an encoder file of a small network."""

    def write(network="vmunet", geometry="native"):
        arguments = {"base_features": 8, "depths": 1, "geometry": geometry, "strides": STRIDES[geometry]}
        description = EncoderDescription(
            network=network,
            arguments=arguments,
            input_channels=1,
            patch_size=(32, 32, 32),
            spacing_mm=(1.5, 1.25, 1.0),
            axes="SAR",
            reader="NibabelIOWithReorient",
            modality="ct",
            normalisation={"scheme": "CTNormalization", "low": -175, "high": 250, "mean": -175, "std": 425},
            corpus={"hash": "5eed", "volumes": 3},
            training={"steps": 10, "objective": "mim"},
            citation=("A paper (2024)",),
            version="0.1",
        )
        built = create_network(network, 1, 2, **arguments)
        write_encoder(tmp_path / "encoder.safetensors", built.encoder, description)
        return tmp_path / "encoder.safetensors"

    return write


@pytest.mark.parametrize("geometry", STRIDES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_block_builds_the_network_and_finds_encoder_and_stem(network, geometry, encoder, tmp_path):
    path = encoder(network, geometry)
    write_nnssl_checkpoint(tmp_path / "out.pth", path)
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    block = content["nnssl_adaptation_plan"]
    assert json.loads(json.dumps(block)) == block
    architecture = block["architecture_plans"]
    build = pydoc.locate(architecture["arch_class_name"])
    channels = block["pretrain_num_input_channels"]
    built = build(input_channels=channels, num_classes=2, **architecture["arch_kwargs"], deep_supervision=False)
    prefix = f"{block['key_to_encoder']}."
    weights = content["network_weights"]
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    built.get_submodule(block["key_to_encoder"]).load_state_dict(found)
    expected = read_encoder(path)[1]
    assert len(weights) == len(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert built.get_submodule(block["key_to_stem"]).in_channels == channels
    assert weights[f"{block['keys_to_in_proj'][0]}.weight"].shape[1] == channels


def test_the_block_says_how_the_images_were_made(encoder, tmp_path):
    path = encoder()
    write_nnssl_checkpoint(tmp_path / "out.pth", path)
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    plan = content["nnssl_adaptation_plan"]["pretrain_plan"]
    (configuration,) = plan["configurations"].values()
    assert configuration["spacing"] == [1.5, 1.25, 1.0]
    assert configuration["patch_size"] == [32, 32, 32]
    assert configuration["normalization_schemes"] == ["CTNormalization"]
    assert plan["image_reader_writer"] == "NibabelIOWithReorient"
    assert content["citations"][0]["apa_citations"] == ["A paper (2024)"]
    assert EncoderDescription.from_json(content["medmamba_encoder"]) == read_encoder(path)[0]


def test_the_command_says_what_the_file_says(encoder, tmp_path, capsys):
    path, out = encoder(), tmp_path / "out.pth"
    assert main(["encoder", str(path), "--nnssl", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("vmunet, 32 tensors", "1.5 x 1.25 x 1 mm", "std 425", "hash 5eed", "steps 10", "cite       A paper"):
        assert text in printed
    assert f"wrote {out}" in printed
    assert len(torch.load(out, weights_only=True)["network_weights"]) == 32


def test_bad_files_and_folders_are_one_line(encoder, tmp_path, capsys):
    path = encoder()
    assert main(["encoder", str(path), "--nnssl", str(tmp_path / "nowhere" / "out.pth")]) == 2
    assert "out.pth cannot be written (" in capsys.readouterr().err.strip().splitlines()[-1]
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["encoder", str(path)]) == 2
    assert "cannot be read as safetensors" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        write_nnssl_checkpoint(tmp_path / "out.pth", path)
    assert not (tmp_path / "out.pth").exists()
