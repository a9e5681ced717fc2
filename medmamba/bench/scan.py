"""Runs the cases of the scan bench, backend by backend, and writes one CSV."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from medmamba.bench.cases import Case, all_cases
from medmamba.bench.measure import copy_bandwidth, peak_mib, time_it
from medmamba.command import CommandError
from medmamba_kernels import BACKENDS
from medmamba_kernels.testing import Problem, make_problem, self_test

#: Scans above this many elements are not run through the reference, which takes about a microsecond each.
REFERENCE_ELEMENTS = 2**21


def run(backends: Sequence[str], cases: Sequence[Case], seconds: float) -> Iterator[dict[str, Any]]:
    """One row per case, backend and pass. Backends that are not correct here are refused before anything is timed.

    Args:
        backends: names in ``BACKENDS``, or "reference" (small cases only).
        cases: what to run.
        seconds: time to spend on each row.

    Raises:
        CommandError: a backend cannot run here, or its self-test exceeds the tolerance.
    """
    gate(backends)
    bandwidth = copy_bandwidth()
    for case in cases:
        problem = make_problem(
            case.grid, channels=case.channels, state_size=case.state_size, routes=case.routes, dtype=torch.float32
        )
        for backend in backends:
            if backend == "reference" and case.elements > REFERENCE_ELEMENTS:
                continue
            for name, function in passes(problem, backend).items():
                yield {**describe(case, backend, name, bandwidth), **measured(case, function, seconds)}


def gate(backends: Sequence[str]) -> None:
    """No number on red: every backend must pass its self-test first."""
    for backend in backends:
        if backend == "reference":
            continue
        reason = BACKENDS[backend].unavailable_reason(torch.device("cpu"))
        if reason is not None:
            raise CommandError(f"backend {backend} cannot run here: {reason}")
        error, passed = self_test(backend)
        if not passed:
            raise CommandError(f"backend {backend} fails its self-test (error {error:.1e}); no times are taken", 1)


def passes(problem: Problem, backend: str) -> dict[str, Callable[[], object]]:
    """Functions for "forward" (inference) and "training" (forward and backward)."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.leaves.items()}
    training = problem.with_leaves(leaves)
    cotangent = torch.ones_like(problem.x)

    def train() -> object:
        return torch.autograd.grad(training.run(backend), list(leaves.values()), cotangent)

    return {"forward": partial(problem.run, backend), "training": train}


def describe(case: Case, backend: str, name: str, bandwidth: float) -> dict[str, Any]:
    return {
        "op": "selective_scan",
        "backend": backend,
        "case": case.name,
        "grid": "x".join(map(str, case.grid)),
        "channels": case.channels,
        "state_size": case.state_size,
        "routes": case.routes,
        "dtype": "float32",
        "pass": name,
        "threads": torch.get_num_threads(),
        # The floor of a forward pass; a training pass reads everything at least twice more.
        "memory_floor_ms": round(case.bytes_moved / bandwidth * 1e3 * (1 if name == "forward" else 3), 3),
        "exponentials": case.exponentials,
    }


def measured(case: Case, function: Callable[[], object], seconds: float) -> dict[str, Any]:
    memory = peak_mib(function)
    timing = time_it(function, seconds)
    return {
        "p20_ms": round(timing.p20, 3),
        "p50_ms": round(timing.p50, 3),
        "p80_ms": round(timing.p80, 3),
        "cpu_min_ms": round(timing.cpu_min, 3),
        "repeats": timing.repeats,
        "ns_per_element": round(timing.p50 * 1e6 / case.elements, 3),
        "cpu_ns_per_element": round(timing.cpu_min * 1e6 / case.elements, 3),
        "peak_mib": "" if memory is None else round(memory, 1),
        "gate": "self-test passed",
    }


def machine() -> dict[str, str]:
    """What the numbers belong to; the same in every row of a file."""
    return {
        "processor": _processor(),
        "torch": version("torch"),
        "medmamba": version("medmamba"),
        "commit": _commit(),
    }


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write rows as CSV, with the machine in the last columns."""
    facts = machine()
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of the checkout that medmamba is run from, or an empty text for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def select(pattern: str | None) -> list[Case]:
    """All cases, or those whose name contains ``pattern``.

    Raises:
        CommandError: none does; the text lists the names.
    """
    cases = all_cases()
    chosen = [case for case in cases if pattern is None or pattern in case.name]
    if not chosen:
        raise CommandError(f"no case contains {pattern!r}; known: {', '.join(case.name for case in cases)}")
    return chosen
