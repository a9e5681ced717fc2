"""Modules of volumes beside a full convolution of the same width, on the same volume and in one process."""

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
from medmamba_kernels import BACKENDS
from medmamba_kernels.routes import Grid

#: The convolution that ratios are to.
YARDSTICK = "conv 3x3x3"
LAYOUTS = ("NCDHW", "channels last")


@dataclass(frozen=True)
class VolumeCase:
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


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: of a core, or of a convolution.
        kind: "convolution", "core" or "mixer".
        layout: "tokens" (B, L, C), which is channels last; of a convolution one of ``LAYOUTS``.
        build: the module for a case. One on tokens is called ``(u, grid)``.
    """

    name: str
    kind: str
    layout: str
    build: Callable[[VolumeCase], nn.Module]


def yardsticks() -> list[Contender]:
    """The full convolution in both memory formats."""
    return [convolution(YARDSTICK, layout) for layout in LAYOUTS]


def convolution(name: str, layout: str) -> Contender:
    """A convolution by its name: kernel, and depthwise or not."""
    kind, _, kernel = name.rpartition(" ")
    sizes = [int(size) for size in kernel.split("x")]
    return Contender(name, "convolution", layout, partial(_convolution, sizes, kind == "depthwise"))


def _convolution(sizes: Sequence[int], is_depthwise: bool, case: VolumeCase) -> nn.Module:
    return conv(case.channels, case.channels, sizes, groups=case.channels if is_depthwise else 1)


def choose(cases: Sequence[VolumeCase], pattern: str | None) -> list[VolumeCase]:
    """Cases whose name contains the pattern; all without.

    Raises:
        CommandError: no such case; the text lists the names.
    """
    chosen = [case for case in cases if pattern is None or pattern in case.name]
    if not chosen:
        raise CommandError(f"no case contains {pattern!r}; known: {', '.join(case.name for case in cases)}")
    return chosen


def run(
    contenders: Sequence[Contender],
    cases: Sequence[VolumeCase],
    seconds: float,
    device: torch.device = CPU,
    facts: Callable[[VolumeCase, nn.Module], Row] = lambda case, module: {},
) -> Iterator[Row]:
    """One row per case, contender and pass.

    Args:
        contenders: what to time.
        cases: the volumes.
        seconds: time to spend on each row.
        device: where.
        facts: further columns of a module of tokens; those of a convolution are empty.

    Raises:
        CommandError: a backend of the scan that works here fails its self-test.
    """
    scan.gate([name for name, module in BACKENDS.items() if module.unavailable_reason(device) is None], device)
    bandwidth = copy_bandwidth(device)
    for case in cases:
        for contender in contenders:
            torch.manual_seed(0)
            module = contender.build(case).to(device)
            row = describe(case, contender, module, bandwidth, device)
            row |= facts(case, module)
            for name, values in _timed(case, contender, module, seconds, device):
                floor = row["memory_floor_ms"] * (1 if name == "forward" else 3)
                yield {**row, "pass": name, "memory_floor_ms": round(floor, 4), **values}


def _timed(
    case: VolumeCase, contender: Contender, module: nn.Module, seconds: float, device: torch.device
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
    case: VolumeCase, contender: Contender, module: nn.Module, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Functions for "forward" (inference) and "training" (forward, and backward with all gradients)."""
    if contender.layout == "tokens":
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
    arguments = (case.grid,) if contender.layout == "tokens" else ()

    def forward() -> object:
        with torch.no_grad():
            return module(x, *arguments)

    def train() -> object:
        return torch.autograd.grad(module(leaf, *arguments), [leaf, *module.parameters()], cotangent)

    return {"forward": forward, "training": train}


def describe(case: VolumeCase, contender: Contender, module: nn.Module, bandwidth: float, device: torch.device) -> Row:
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


def _mega_macs(case: VolumeCase, contender: Contender, module: nn.Module) -> float | str:
    if case.length > getattr(module, "max_tokens", case.length):
        return ""
    whole = OnTokens(module, case.grid) if contender.layout == "tokens" else module
    return round(operations(whole, case.channels, case.grid).total / 1e6, 3)


class OnTokens(nn.Module):
    """A module of tokens as one of volumes."""

    def __init__(self, module: nn.Module, grid: Grid):
        super().__init__()
        self.module = module
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x.flatten(2).mT, self.grid)
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
