"""Stock plans, and a folder that holds them as nnU-Net would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
