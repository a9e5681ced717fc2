"""What the recipes cost: disk and time for corpora of 100, 6,814 and 100,000 volumes.

    python pretrain/results/recipes.py pretrain/results/recipes.csv

Operations are those of the convolutions and matrix products of one training step (forward and backward), counted by
torch on a crop of two units per axis and multiplied by the ratio of voxels, because all of them work position by
position; the scan's own are left out (under a hundredth of these networks' work). CPU seconds are measured for ct-small
only, with one thread.

Everything in hours and GiB is arithmetic on measurements and assumptions, named here once:

- a CT covers 410 x 410 x 450 mm and a brain MR 180 x 220 x 180 mm, and a stored voxel takes 0.9 bytes (measured on a
  noisy CT, see medmamba_pretrain/corpus/volume.py); ingesting takes 1.2 CPU seconds per CT (ingest.csv), and as much
  is assumed for MR;
- a GPU does 60 to 150 TFLOP/s on these convolutions in bfloat16. This is a guess for one H200, not measured.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from medmamba.bench.commit import commit_of
from medmamba.networks import create_network
from medmamba_pretrain.masking import draw_units
from medmamba_pretrain.model import Pretraining
from medmamba_pretrain.recipe import RECIPES, Recipe, read_recipe

TIMED = ("ct-small",)
VOLUMES = (100, 6_814, 100_000)
EXTENT_MM = {"ct": (410, 410, 450), "mr": (180, 220, 180)}
BYTES_PER_VOXEL = 0.9
INGEST_CPU_S = 1.2
GPU_TFLOPS = (60, 150)


def model_of(recipe: Recipe) -> Pretraining:
    torch.manual_seed(0)
    return Pretraining(create_network(recipe.network, 1, 2, **recipe.network_arguments), recipe)


def step(model: Pretraining, recipe: Recipe, crops: int) -> None:
    image = torch.randn(crops, 1, *recipe.patch_size)
    visible = draw_units(crops, model.units, recipe.mask_ratio)
    model(image, visible, ~visible, int((~visible).sum())).backward()


def gflop_per_crop(recipe: Recipe) -> float:
    units = model_of(recipe).units
    unit = [size // n for size, n in zip(recipe.patch_size, units, strict=True)]
    small = replace(recipe, patch_size=tuple(2 * size for size in unit))
    with FlopCounterMode(display=False) as counter:
        step(model_of(small), small, 1)
    return counter.get_total_flops() * math.prod(units) / 8 / 1e9


def cpu_s_per_step(recipe: Recipe) -> float:
    model = model_of(recipe)
    step(model, recipe, recipe.batch_size)
    times = []
    for _ in range(5):
        started = time.process_time()
        step(model, recipe, recipe.batch_size)
        times.append(time.process_time() - started)
    return min(times)


def disk_gib(recipe: Recipe, volumes: int) -> float:
    voxels = math.prod(EXTENT_MM[recipe.modality]) / math.prod(recipe.spacing_mm)
    return volumes * voxels * BYTES_PER_VOXEL / 2**30


def short(value: float) -> str:
    """Two digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def row(name: str) -> dict[str, object]:
    recipe = read_recipe(name)
    model = model_of(recipe)
    gflop = gflop_per_crop(recipe)
    pflop = gflop * recipe.steps * recipe.batch_size / 1e6
    cpu_s = cpu_s_per_step(recipe) if name in TIMED else None
    return {
        "recipe": name,
        "encoder_parameters": sum(p.numel() for p in model.encoder.parameters()),
        "other_parameters": sum(p.numel() for m in (model.decoder, model.fills) for p in m.parameters()),
        "units": "x".join(map(str, model.units)),
        "gflop_per_crop": round(gflop, 1),
        "crops": recipe.steps * recipe.batch_size,
        "pflop": short(pflop),
        "cpu_s_per_step": f"{cpu_s:.2f}" if cpu_s else "",
        "training_cpu_h": short(cpu_s * recipe.steps / 3600) if cpu_s else "",
        "training_gpu_h_fast": "" if cpu_s else short(pflop * 1e3 / max(GPU_TFLOPS) / 3600),
        "training_gpu_h_slow": "" if cpu_s else short(pflop * 1e3 / min(GPU_TFLOPS) / 3600),
        **{f"disk_gib_{n}": short(disk_gib(recipe, n)) for n in VOLUMES},
        **{f"ingest_core_h_{n}": short(n * INGEST_CPU_S / 3600) for n in VOLUMES},
        "torch": version("torch"),
        "commit": commit_of(Path(__file__)),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rows = [row(path.stem) for path in sorted(RECIPES.glob("*.toml"))]
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
