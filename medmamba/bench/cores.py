"""Runs every core beside convolutions of the same width on the same volume, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from medmamba.bench import scan
from medmamba.bench.measure import CPU, copy_bandwidth
from medmamba.bench.rows import MEASUREMENTS, Row, measured
from medmamba.command import CommandError
from medmamba.diagnostics.operations import operations
from medmamba.layers import conv
from medmamba.mixers import CORES, get_core
from medmamba_kernels import BACKENDS
from medmamba_kernels.routes import Grid

#: What a core of a network with six routes and Mamba's sixteen states is built with; its own options at their defaults.
D_STATE, ROUTES, KERNEL = 16, "raster6", (3, 3, 3)
#: The convolution that ratios are to.
YARDSTICK = "conv 3x3x3"


@dataclass(frozen=True)
class CoreCase:
    """One volume; batch 1, float32."""

    channels: int
    grid: Grid

    @property
    def name(self) -> str:
        return f"C {self.channels} {'x'.join(map(str, self.grid))}"

    @property
    def length(self) -> int:
        """Tokens."""
        return math.prod(self.grid)


#: Widths and sizes that nnU-Net has at strides 2, 4 and 8 of a patch of 96 cubed.
CASES = (CoreCase(64, (48, 48, 48)), CoreCase(128, (24, 24, 24)), CoreCase(256, (12, 12, 12)))


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: of a core, or of a convolution.
        kind: "core" or "convolution".
        layout: "tokens" (B, L, C), which is channels last; of a convolution "NCDHW" or "channels last".
        build: the module for so many channels.
    """

    name: str
    kind: str
    layout: str
    build: Callable[[int], nn.Module]


def contenders(cores: Sequence[str]) -> list[Contender]:
    """Convolutions in both memory formats, the yardstick first, then cores by name."""
    convolutions: dict[str, Callable[[int], nn.Module]] = {
        YARDSTICK: _full,
        "depthwise 3x3x3": partial(_depthwise, 3),
        "depthwise 5x5x5": partial(_depthwise, 5),
    }
    return [
        *(
            Contender(name, "convolution", layout, build)
            for layout in ("NCDHW", "channels last")
            for name, build in convolutions.items()
        ),
        *(Contender(name, "core", "tokens", partial(core, name)) for name in cores),
    ]


def _full(channels: int) -> nn.Module:
    return conv(channels, channels, KERNEL)


def _depthwise(size: int, channels: int) -> nn.Module:
    return conv(channels, channels, [size] * 3, groups=channels)


def core(name: str, channels: int) -> nn.Module:
    """A core as a network would build it on this many channels."""
    rank = math.ceil(channels / 16)
    return get_core(name)(channels, d_state=D_STATE, dt_rank=rank, routes=ROUTES, kernel_size=KERNEL)


def select(cores: Sequence[str] | None, pattern: str | None) -> tuple[list[str], list[CoreCase]]:
    """Cores by name and cases by a part of their name; all without.

    Raises:
        CommandError: an unknown core, or no such case; the text lists the names.
    """
    for name in cores or []:
        if name not in CORES:
            raise CommandError(f"no core {name!r}; known: {', '.join(sorted(CORES))}")
    cases = [case for case in CASES if pattern is None or pattern in case.name]
    if not cases:
        raise CommandError(f"no case contains {pattern!r}; known: {', '.join(case.name for case in CASES)}")
    return list(cores or sorted(CORES)), cases


def run(cores: Sequence[str], cases: Sequence[CoreCase], seconds: float, device: torch.device = CPU) -> Iterator[Row]:
    """One row per case, contender and pass.

    Args:
        cores: names in ``CORES``.
        cases: what to run.
        seconds: time to spend on each row.
        device: where.

    Raises:
        CommandError: a backend of the scan that works here fails its self-test.
    """
    scan.gate([name for name, module in BACKENDS.items() if module.unavailable_reason(device) is None], device)
    bandwidth = copy_bandwidth(device)
    for case in cases:
        for contender in contenders(cores):
            torch.manual_seed(0)
            module = contender.build(case.channels).to(device)
            facts = describe(case, contender, module, bandwidth, device)
            for name, values in _timed(case, contender, module, seconds, device):
                floor = facts["memory_floor_ms"] * (1 if name == "forward" else 3)
                yield {**facts, "pass": name, "memory_floor_ms": round(floor, 4), **values}


def _timed(
    case: CoreCase, contender: Contender, module: nn.Module, seconds: float, device: torch.device
) -> Iterator[tuple[str, Row]]:
    """Pass and measurements, or a note why there are none."""
    budget = getattr(module, "max_tokens", None)
    for name, function in passes(case, contender, module, device).items():
        reason = f"{case.length} tokens are above its budget of {budget}"
        if budget is None or case.length <= budget:
            try:
                yield name, {**measured(function, case.length * case.channels, seconds, device), "note": ""}
                continue
            except torch.OutOfMemoryError:
                reason = "runs out of memory"
        yield name, {**dict.fromkeys(MEASUREMENTS, ""), "note": f"not run: {reason}"}


def passes(
    case: CoreCase, contender: Contender, module: nn.Module, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Functions for "forward" (inference) and "training" (forward, and backward with all gradients)."""
    if contender.kind == "core":
        shape: tuple[int, ...] = (1, case.length, case.channels)
        memory_format = torch.contiguous_format
    else:
        shape = (1, case.channels, *case.grid)
        is_last = contender.layout == "channels last"
        memory_format = torch.channels_last_3d if is_last else torch.contiguous_format
        module.to(memory_format=memory_format)
    x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    leaf = x.clone().requires_grad_()
    cotangent = torch.randn_like(x)
    arguments = (case.grid,) if contender.kind == "core" else ()

    def forward() -> object:
        with torch.no_grad():
            return module(x, *arguments)

    def train() -> object:
        return torch.autograd.grad(module(leaf, *arguments), [leaf, *module.parameters()], cotangent)

    return {"forward": forward, "training": train}


def describe(case: CoreCase, contender: Contender, module: nn.Module, bandwidth: float, device: torch.device) -> Row:
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "case": case.name,
        "contender": contender.name,
        "kind": contender.kind,
        "layout": contender.layout,
        "grid": "x".join(map(str, case.grid)),
        "channels": case.channels,
        "parameters": parameters,
        "mega_macs": _mega_macs(case, contender, module),
        "dtype": "float32",
        "pass": "",
        "threads": torch.get_num_threads(),
        # Read the input and the weights and write the output, once; run multiplies by three for training.
        "memory_floor_ms": (2 * case.length * case.channels + parameters) * 4 / bandwidth * 1e3,
        "device": device.type,
        "gate": "self-test passed",
    }


def _mega_macs(case: CoreCase, contender: Contender, module: nn.Module) -> float | str:
    if case.length > getattr(module, "max_tokens", case.length):
        return ""
    whole = _OnTokens(module, case.grid) if contender.kind == "core" else module
    return round(operations(whole, case.channels, case.grid).total / 1e6, 3)


class _OnTokens(nn.Module):
    """A core as a module of volumes."""

    def __init__(self, core: nn.Module, grid: Grid):
        super().__init__()
        self.core = core
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.core(x.flatten(2).mT, self.grid)
        return y


def ratios(rows: Sequence[Row]) -> dict[tuple[str, str], dict[tuple[int, str], float]]:
    """Time of everything over that of the yardstick in its faster memory format.

    The time is ``p50_ms``; with one thread on a CPU it is ``cpu_min_ms``, which other processes disturb less.

    Returns:
        (contender, layout) -> (channels, pass) -> ratio; what was not run is missing.
    """
    table: dict[tuple[str, str], dict[tuple[int, str], float]] = {}
    best: dict[tuple[int, str], float] = {}
    timed = [row for row in rows if not row["note"]]
    for row in timed:
        key = (row["channels"], row["pass"])
        if row["contender"] == YARDSTICK:
            best[key] = min(best.get(key, math.inf), _milliseconds(row))
    for row in timed:
        key = (row["channels"], row["pass"])
        table.setdefault((row["contender"], row["layout"]), {})[key] = _milliseconds(row) / best[key]
    return table


def _milliseconds(row: Row) -> float:
    is_single = row["device"] == "cpu" and int(row["threads"]) == 1
    return float(row["cpu_min_ms"] if is_single else row["p50_ms"])


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table of ``ratios`` for people, with a dash for what was not run."""
    table = ratios(rows)
    columns = list(dict.fromkeys((row["channels"], row["pass"]) for row in rows))
    yield f"time x of one {YARDSTICK} of the same width, in its faster memory format"
    yield f"{'':<30}" + "".join(f" {f'C {channels} {name}':>15}" for channels, name in columns)
    for (contender, layout), cells in table.items():
        values = (f"{cells[column]:.3g}" if column in cells else "-" for column in columns)
        yield f"{contender:<16} {layout:<13}" + "".join(f" {value:>15}" for value in values)
