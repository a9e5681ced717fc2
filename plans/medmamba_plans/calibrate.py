"""Measure the memory of trainings, and fit the coefficients of :class:`medmamba.diagnostics.MemoryModel` to them."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import CommandError

if TYPE_CHECKING:
    from medmamba.diagnostics import MemoryModel

MIB = 2**20
#: Measurements for three coefficients.
FEWEST = 3
#: nnU-Net's own networks, measured along: what is counted must hold for them as well.
STOCK = ("PlainConvUNet", "ResidualEncoderUNet")
#: glibc keeps freed memory for later, more or less by chance (10 % in the peak of equal runs). With this every tensor
#: above 64 KiB is given back when it is freed.
_CALM_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A training to measure.

    Attributes:
        network: in the registry, or one of ``STOCK``.
        patch_size: voxels per axis.
        batch_size: samples.
        strides: per stage and axis, as in nnU-Net's plans.
        options: arguments of the network.
        input_channels: of the images.
        num_classes: including background.
    """

    network: str
    patch_size: tuple[int, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    input_channels: int = 1
    num_classes: int = 3

    @property
    def name(self) -> str:
        options = "".join(f" {value}" for value in self.options.values())
        return f"{self.network}{options} {'x'.join(map(str, self.patch_size))} batch {self.batch_size}"

    def block(self) -> dict[str, Any]:
        """Architecture block with nnU-Net's widths and kernels for these strides."""
        from medmamba.nnunet.architecture import architecture_block

        stock = stock_block(self.network if self.network in STOCK else STOCK[0], self.strides)
        return stock if self.network in STOCK else architecture_block(self.network, stock, self.options)


def stock_block(kind: str, strides: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Architecture block of nnU-Net's own networks as its planners write it."""
    stages, ndim = len(strides), len(strides[0])
    flat = tuple(strides[1]) == (1, 2, 2)
    features = [min(512 if ndim == 2 else 320, 32 * 2**i) for i in range(stages)]
    blocks = {
        "PlainConvUNet": {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)},
        "ResidualEncoderUNet": {
            "n_blocks_per_stage": [1, 3, 4, *[6] * stages][:stages],
            "n_conv_per_stage_decoder": [1] * (stages - 1),
        },
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": features,
            "conv_op": f"torch.nn.Conv{ndim}d",
            # As nnU-Net where the first axis is the coarse one: flat kernels until its first downsampling.
            "kernel_sizes": [[1, 3, 3] if i < 2 and flat else [3] * ndim for i in range(stages)],
            "strides": [list(stride) for stride in strides],
            **blocks[kind],
            "conv_bias": True,
            "norm_op": f"torch.nn.InstanceNorm{ndim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _stages(count: int, ndim: int = 3) -> tuple[tuple[int, ...], ...]:
    return ((1,) * ndim, *((2,) * ndim,) * (count - 1))


_FLAT = ((1, 1, 1), (1, 2, 2), *((2, 2, 2),) * 2)
_FLAT_LARGE = ((1, 1, 1), (1, 2, 2), *((2, 2, 2),) * 3, (1, 2, 2))


def cases(device: str) -> list[Case]:
    """Every registered network at an isotropic and an anisotropic patch, nnU-Net's, and variations of VM-UNet."""
    from medmamba.networks import NETWORKS

    names = [*sorted(NETWORKS), *STOCK]
    if device == "cpu":
        found = [Case(name, (40, 56, 40), 2, _stages(4)) for name in names]
        found += [Case(name, (16, 64, 64), 2, _FLAT) for name in names]
        found += [Case(name, (256, 256), 2, _stages(6, 2)) for name in ("vmunet", "PlainConvUNet")]
        found += [Case(name, (64, 64, 64), 1, _stages(5)) for name in ("vmunet", "PlainConvUNet")]
        cube, four = (32, 32, 32), _stages(4)
    else:
        found = [Case(name, (128, 128, 128), 2, _stages(6)) for name in names]
        found += [Case(name, (56, 160, 192), 2, _FLAT_LARGE) for name in names]
        found += [Case(name, (512, 512), 12, _stages(8, 2)) for name in names]
        found += [Case(name, (40, 56, 40), 16, _stages(4)) for name in ("vmunet", "PlainConvUNet")]
        found += [Case(name, (160, 192, 160), 2, _stages(6)) for name in ("vmunet", "PlainConvUNet")]
        cube, four = (96, 96, 96), _stages(5)
    found += [Case("vmunet", cube, batch, four) for batch in (2, 8)]
    found += [Case("vmunet", cube, 4, four, {"ssm_mode": "identity"}), Case("vmunet", cube, 4, four, num_classes=20)]
    found += [Case("vmunet", tuple(2 * n for n in cube), 2, _stages(5), {"geometry": "faithful"})]
    return found


def measure(chosen: Iterable[Case], device: str, is_compiled: bool = False) -> Iterator[dict[str, Any]]:
    """Train every case in a fresh process; one row each, with what is counted beside what is measured.

    Raises:
        CommandError: a training fails; the text holds the last line of its error.
    """
    import torch

    from medmamba.diagnostics import footprint
    from medmamba.nnunet.architecture import build_network

    for case in chosen:
        block = case.block()
        with torch.device("meta"):
            network = build_network(block, case.input_channels, case.num_classes)
        counted = footprint(network, case.input_channels, case.patch_size, device=device)
        peak = _in_a_child(case, block, device, is_compiled)
        yield {
            "device": device,
            "network": case.network,
            "options": " ".join(f"{name}={value}" for name, value in case.options.items()),
            "patch_size": "x".join(map(str, case.patch_size)),
            "batch_size": case.batch_size,
            "input_channels": case.input_channels,
            "num_classes": case.num_classes,
            "is_compiled": int(is_compiled),
            "parameters": counted.parameters,
            "kept_mib": round(counted.kept / MIB, 1),
            "live_mib": round(counted.peak / MIB, 1),
            "allocated_mib": peak.get("allocated_mib", ""),
            "context_mib": peak.get("context_mib", ""),
            "peak_mib": peak["peak_mib"],
        }


def _in_a_child(case: Case, block: Mapping[str, Any], device: str, is_compiled: bool) -> dict[str, float]:
    job = {
        "block": block,
        "input_channels": case.input_channels,
        "num_classes": case.num_classes,
        "patch_size": case.patch_size,
        "batch_size": case.batch_size,
        "device": device,
        "is_compiled": is_compiled,
    }
    command = [sys.executable, "-m", "medmamba_plans.training_peak", json.dumps(job)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_CALM_ALLOCATOR})
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise CommandError(f"{case.name} on {device} cannot be measured: {reason}", 1)
    return json.loads(child.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Fit:
    """A fitted model, and measured over predicted memory of every row."""

    model: MemoryModel
    ratios: tuple[float, ...]


def fit(rows: Sequence[Mapping[str, Any]], source: str) -> Fit:
    """Coefficients that are not negative and have the least sum of squared relative errors.

    Args:
        rows: of one device, as :func:`measure` gives them or :func:`read` reads them.
        source: what they are, in words.

    Raises:
        CommandError: fewer rows than coefficients.
    """
    import numpy as np
    from scipy.optimize import nnls

    from medmamba.diagnostics import MemoryModel

    if len(rows) < FEWEST:
        raise CommandError(f"three coefficients cannot be fitted to {len(rows)} measurements; measure more cases")
    columns = [("parameters", 1 / MIB), ("live_mib", 1.0)]
    counted = np.array([[1.0, *(float(row[name]) * unit for name, unit in columns)] for row in rows])
    counted[:, 2] *= [int(row["batch_size"]) for row in rows]
    measured = np.array([float(row["peak_mib"]) for row in rows])
    coefficients, _ = nnls(counted / measured[:, None], np.ones(len(rows)))
    fixed, per_parameter, factor = coefficients.tolist()
    model = MemoryModel(round(fixed * MIB), round(per_parameter, 3), round(factor, 4), True, source)
    return Fit(model, tuple((measured / (counted @ coefficients)).tolist()))


def machine(device: str) -> dict[str, str]:
    """What the numbers belong to; the same in every row of a file."""
    import torch

    processor = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {"processor": processor, "torch": version("torch"), "medmamba": version("medmamba"), "commit": _commit()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of the checkout that runs, or an empty text for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str], out: Path) -> None:
    """Write rows as CSV, with the machine in the last columns."""
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV of :func:`write`.

    Raises:
        CommandError: the file is missing or is no such CSV.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise CommandError(f"{path} cannot be read ({error.strerror})") from error
    if not rows or "peak_mib" not in rows[0]:
        raise CommandError(f"{path} holds no measurements; `medmamba calibrate --out {path}` writes them")
    return rows
