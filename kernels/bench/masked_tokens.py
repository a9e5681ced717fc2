"""What a scan saves where tokens are masked out, and how many tokens of real CTs are air.

    python kernels/bench/masked_tokens.py time OUT.csv [--rounds 9]
    python kernels/bench/masked_tokens.py air OUT.csv FOLDER=DxHxW [FOLDER=DxHxW ...]

``time``: a ScanCore as networks have it, on the CPU, without a mask and with a quarter, half and three quarters of its
tokens masked: ``air`` is what lies outside of an ellipsoid in the middle, ``random`` is spread evenly. All variants run
in turn in one process, ``--rounds`` times; ``ratio`` is the least processor time over that without a mask.

``air``: every CT of a folder, in HU, cut into tiles of D x H x W voxels as a prediction does (padded where it is
smaller), and per stride the share of a tile's tokens that have nothing but air or padding: mean over tiles, then mean,
least and most over images. Air is below -500 HU, joined with the border of the image and more than 3 voxels from
anything else.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmamba.bench.scan import gate, machine
from medmamba.inference.predictor.air import air_mask
from medmamba.inference.predictor.case import pad_to_tile
from medmamba.inference.predictor.window import tile_starts
from medmamba.inference.reading import read_image
from medmamba.mixers import ScanCore, pool_mask

#: Grid, channels, states and rank of the step sizes: grids of our networks at a patch of 128 cubed, fewer channels.
CORES = (((32, 32, 32), 96, 16, 6), ((16, 16, 16), 192, 16, 12), ((8, 8, 8), 384, 16, 24), ((32, 32, 32), 96, 1, 6))
SHARES = (0.25, 0.5, 0.75)
STRIDES = (1, 2, 4, 8, 16, 32)
AIR_HU = -500.0


def ellipsoid(grid: tuple[int, ...], masked: float) -> torch.Tensor:
    """(1, L) bool, True for the share of tokens that is nearest to the centre."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in grid), indexing="ij")
    distance = sum(axis.square() for axis in axes)
    return nearest(distance, masked)


def scattered(grid: tuple[int, ...], masked: float) -> torch.Tensor:
    """(1, L) bool, True for a random share of tokens."""
    return nearest(torch.rand(grid, generator=torch.Generator().manual_seed(0)), masked)


def nearest(distance: torch.Tensor, masked: float) -> torch.Tensor:
    flat = distance.flatten()
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[: round(len(flat) * (1 - masked))]] = True
    return kept[None]


def passes(core: ScanCore, u: torch.Tensor, grid: tuple[int, int, int], mask: torch.Tensor | None) -> dict[str, Any]:
    def forward() -> None:
        with torch.inference_mode():
            core(u, grid, mask=mask)

    def training() -> None:
        leaf = u.clone().requires_grad_()
        torch.autograd.grad(core(leaf, grid, mask=mask), [leaf, *core.parameters()], torch.ones_like(u))

    return {"forward": forward, "training": training}


def in_turn(functions: list[Callable[[], None]], rounds: int) -> list[tuple[float, float]]:
    """Median wall and least processor time of each, in milliseconds; they take turns, after one round to warm up."""
    wall: list[list[float]] = [[] for _ in functions]
    cpu: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for number, function in enumerate(functions):
            before = time.perf_counter(), time.process_time()
            function()
            after = time.perf_counter(), time.process_time()
            if turn:
                wall[number].append(1e3 * (after[0] - before[0]))
                cpu[number].append(1e3 * (after[1] - before[1]))
    return [(statistics.median(w), min(c)) for w, c in zip(wall, cpu, strict=True)]


def time_masks(rounds: int) -> Iterator[dict[str, Any]]:
    gate(["native"], torch.device("cpu"))
    for grid, width, states, rank in CORES:
        torch.manual_seed(0)
        core = ScanCore(width, d_state=states, dt_rank=rank, routes="raster6")
        u = torch.randn(1, int(np.prod(grid)), width)
        variants: list[tuple[str, float, torch.Tensor | None]] = [
            ("none", 0.0, None),
            ("all kept", 0.0, torch.ones(1, u.shape[1], dtype=torch.bool)),
        ]
        for share in SHARES:
            variants += [("air", share, ellipsoid(grid, share)), ("random", share, scattered(grid, share))]
        for name in ("forward", "training"):
            timings = in_turn([passes(core, u, grid, mask)[name] for _, _, mask in variants], rounds)
            for (pattern, share, _), (wall, cpu) in zip(variants, timings, strict=True):
                yield {
                    "grid": "x".join(map(str, grid)),
                    "channels": width,
                    "state_size": states,
                    "dt_rank": rank,
                    "routes": "raster6",
                    "backend": "native",
                    "pass": name,
                    "pattern": pattern,
                    "masked": share,
                    "p50_ms": f"{wall:.3f}",
                    "cpu_min_ms": f"{cpu:.3f}",
                    "ratio": f"{cpu / timings[0][1]:.3f}",
                    "rounds": rounds,
                    "threads": torch.get_num_threads(),
                    **machine(),
                }


def air_of(folder: Path, tile: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One row per stride, over the images of a folder."""
    shares: dict[int, list[float]] = {stride: [] for stride in STRIDES if not any(size % stride for size in tile)}
    padding = []
    for path in sorted(folder.glob("*.nii.gz")):
        values = torch.from_numpy(read_image(path).values.astype(np.float32))
        nothing, _ = pad_to_tile(air_mask(values, AIR_HU)[None], tile, True)
        padding.append(1 - values.numel() / nothing.numel())
        for stride, means in shares.items():
            means.append(statistics.mean(masked_shares(nothing, tile, stride)))
    for stride, means in shares.items():
        yield {
            "dataset": folder.parent.name,
            "images": len(means),
            "tile": "x".join(map(str, tile)),
            "stride": stride,
            "masked": f"{statistics.mean(means):.4f}",
            "masked_least": f"{min(means):.4f}",
            "masked_most": f"{max(means):.4f}",
            "padding": f"{statistics.mean(padding):.4f}",
        }


def masked_shares(nothing: torch.Tensor, tile: tuple[int, ...], stride: int) -> Iterator[float]:
    """Per tile of a mask (1, D, H, W), the share of tokens without a voxel that is something."""
    starts = [tile_starts(size, part, 0.5) for size, part in zip(nothing.shape[1:], tile, strict=True)]
    grid = [size // stride for size in tile]
    for place in itertools.product(*starts):
        part = nothing[:, *(slice(first, first + size) for first, size in zip(place, tile, strict=True))]
        yield 1 - float(pool_mask(~part, grid).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["time", "air"])
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", nargs="*", metavar="FOLDER=DxHxW")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.what == "time":
        rows = time_masks(arguments.rounds)
    else:
        pairs = [each.rpartition("=") for each in arguments.folders]
        rows = (row for folder, _, tile in pairs for row in air_of(Path(folder), tuple(map(int, tile.split("x")))))
    first = next(rows)
    with arguments.out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(first), lineterminator="\n")
        writer.writeheader()
        for row in itertools.chain([first], rows):
            writer.writerow(row)
            stream.flush()


if __name__ == "__main__":
    main()
