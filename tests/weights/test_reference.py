"""The 2D networks that stand for the published ones compute what the released modules computed, under their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba_kernels.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
# part -> file, prefix of its weights' names in the file, input, output
NUMBERS = {
    "SS2D": ("vmunet_ss2d", "", "x", "y"),
    "embed": ("vmunet_resample", "patch_embed.", "x_img", "y_embed"),
    "merge": ("vmunet_resample", "merge.", "x_merge", "y_merge"),
    "expand": ("vmunet_resample", "expand.", "x_expand", "y_expand"),
    "final": ("vmunet_resample", "final.", "x_final", "y_final"),
    "MSVSS": ("msvm_msvss", "", "x", "y"),
    "LKPE": ("msvm_lkpe", "", "x", "y"),
    "MHSM": ("mhsvm_mhsm_d16_h3_t0.0", "", "x", "y"),
}


@pytest.mark.parametrize("part", NUMBERS)
def test_a_part_takes_the_released_weights_and_gives_the_released_result(published, part):
    name, prefix, given, expected = NUMBERS[part]
    stored = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items() if k != "meta"}
    weights = {k.removeprefix(f"w:{prefix}"): v for k, v in stored.items() if k.startswith(f"w:{prefix}")}
    module = published.parts[part]().double().eval()
    module.load_state_dict(weights, strict=True)
    with torch.no_grad():
        y = module(stored[given].double())
    assert_close(part, y, stored[expected].double(), 2e-6)
