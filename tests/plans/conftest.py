"""Stock plans, and a folder that holds them as nnU-Net would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: Small networks whose encoder and decoder have every kind of part.
TINY = {"base_features": 8, "depths": 1, "decoder_depths": 1}
STRIDES = {
    "native": [[1, 1, 1], [2, 2, 2], [1, 2, 2]],
    "faithful": [[1, 1, 1], [2, 4, 4], [2, 2, 2]],
}
CT = {"scheme": "CTNormalization", "low": -175, "high": 250, "mean": -175, "std": 425}
MR = {"scheme": "ZScoreNormalization"}

PLANS = Path(__file__).resolve().parents[1] / "data" / "plans"


@pytest.fixture
def load_plans() -> Callable[[str], dict[str, Any]]:
    """Stock plans by the name of their file in ``tests/data/plans``."""
    return lambda name: json.loads((PLANS / f"{name}.json").read_text())


@pytest.fixture
def dataset(tmp_path, monkeypatch, load_plans) -> Path:
    """A preprocessed dataset that has stock plans and nothing else, with nnU-Net's variables set."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    target = tmp_path / "nnUNet_preprocessed" / "Dataset901_Isotropic"
    target.mkdir()
    (target / "nnUNetPlans.json").write_text(json.dumps(load_plans("isotropic")))
    return target


@pytest.fixture
def make_encoder(tmp_path) -> Callable[..., Path]:
    """Writes the file of an encoder that was not trained; by default one of MRIs."""
    import torch

    from medmamba.networks import create_network
    from medmamba.weights import EncoderDescription, write_encoder

    def make(network: str = "vmunet", geometry: str = "native", seed: int = 0, name: str = "encoder", **values) -> Path:
        content = {
            "network": network,
            "arguments": {**TINY, "geometry": geometry, "strides": STRIDES[geometry]},
            "input_channels": 1,
            "patch_size": [32, 32, 32],
            "spacing_mm": [1.0, 1.25, 1.5],
            "axes": "SAR",
            "reader": "NibabelIOWithReorient",
            "modality": "mr",
            "normalisation": CT if values.get("modality") == "ct" else MR,
            "corpus": {"hash": "5eed", "volumes": 3},
            "training": {"steps": 10},
            "citation": ["First paper (2024)", "Second paper (2025)"],
            "version": "0.1",
        }
        description = EncoderDescription.from_json({**content, **values})
        torch.manual_seed(seed)
        built = create_network(network, description.input_channels, 2, **description.arguments)
        path = tmp_path / f"{name}.safetensors"
        write_encoder(path, built.encoder, description)
        return path

    return make
