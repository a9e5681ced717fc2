"""Peak memory of a prediction, measured in processes of their own: it follows the slab, not the volume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="peak memory is not known on this system")

PLANS = Path(__file__).resolve().parents[1] / "data" / "plans" / "isotropic.json"
IMAGE, TILE = (160, 160, 160), 16
SLAB = 4 * TILE * IMAGE[1] * IMAGE[2]  # bytes per class
VOLUME = 4 * IMAGE[0] * IMAGE[1] * IMAGE[2]
MIB = 2**20
CHILD = """
import hashlib, json, sys
import numpy as np, torch
from medmamba.inference.machine import peak_bytes
from medmamba.inference.model.labels import read_labels
from medmamba.inference.predictor.case import Window, predict_case

plans, shape, classes, max_ram = json.loads(sys.argv[1])
labels = read_labels({"labels": {"background": 0, **{f"organ {k}": k for k in range(1, classes)}}})
steepness = torch.linspace(-1, 1, classes).view(1, -1, 1, 1, 1)
z, y, x = np.ogrid[:6:shape[0] * 1j, :5:shape[1] * 1j, :4:shape[2] * 1j]
values = (np.sin(z) + np.cos(2 * y) * np.sin(3 * x)).astype(np.float32)[None]
window = Window(1.0, max_ram_bytes=max_ram)
found = predict_case(values, (1, 1, 1), lambda x: x * steepness - steepness**2, plans, "3d_fullres", labels, window)
print(json.dumps({"peak": peak_bytes(), "labels": hashlib.sha256(found.tobytes()).hexdigest(), **window.facts}))
"""


def peak_of(classes: int, max_ram: int | None = None) -> dict:
    plans = json.loads(PLANS.read_text())
    plans["configurations"]["3d_fullres"] |= {"patch_size": [TILE] * 3, "spacing": [1] * 3}
    argument = json.dumps([plans, IMAGE, classes, max_ram])
    done = subprocess.run([sys.executable, "-c", CHILD, argument], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_per_class_is_that_of_a_slab_and_a_bound_is_kept():
    """A class costs the slab of one tile's depth; nnU-Net needs 3 to 5 bytes for every voxel of the image."""
    few, some, many = (peak_of(classes) for classes in (3, 8, 40))
    margin = 24 * MIB  # what the allocator holds on to
    for less, more, classes in ((few, some, 5), (some, many, 32)):
        growth = more["peak"] - less["peak"]
        assert growth < 1.3 * classes * SLAB + margin < 0.8 * classes * VOLUME
    assert many["strips"] == 1
    max_ram = few["peak"] + 24 * SLAB
    bound = peak_of(40, max_ram)
    assert bound["strips"] > 1
    assert bound["peak"] <= max_ram
    assert bound["labels"] == many["labels"]
