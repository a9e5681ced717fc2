"""Runs the cases of the scan bench, backend by backend and peer by peer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from medmamba.bench.cases import Case, all_cases
from medmamba.bench.measure import CPU, copy_bandwidth
from medmamba.bench.peers import PEERS, Peer, peer_passes
from medmamba.bench.rows import MEASUREMENTS, Row, measured
from medmamba.command import CommandError
from medmamba_kernels import BACKENDS
from medmamba_kernels.testing import Problem, self_test

#: Scans above this many elements are not run through the reference, which takes about a microsecond each.
REFERENCE_ELEMENTS = 2**21


def run(
    backends: Sequence[str],
    peers: Mapping[str, str],
    cases: Sequence[Case],
    seconds: float,
    device: torch.device = CPU,
) -> Iterator[Row]:
    """One row per case, backend or peer, and pass. Backends that are not correct here are refused before any timing.

    Args:
        backends: names in ``BACKENDS``, or "reference" (small cases only).
        peers: names in ``PEERS`` and what ``check_peers`` said of them; where one cannot do a case, the row says why.
        cases: what to run.
        seconds: time to spend on each row.
        device: where.

    Raises:
        CommandError: a backend cannot run here, or its self-test exceeds the tolerance.
    """
    gate(backends, device)
    bandwidth = copy_bandwidth(device)
    for case in cases:
        problem = case.problem().to(device=device)
        for backend in backends:
            if backend == "reference" and case.elements > REFERENCE_ELEMENTS:
                continue
            for name, function in passes(problem, backend).items():
                row = describe(case, backend, name, bandwidth, device)
                yield {
                    **row,
                    **measured(function, case.elements, seconds, device),
                    "gate": "self-test passed",
                    "note": "",
                }
        for peer, verdict in peers.items():
            for row in run_peer(case, problem, PEERS[peer], seconds, device):
                yield {**describe(case, peer, row["pass"], bandwidth, device), **row, "gate": verdict}


def run_peer(case: Case, problem: Problem, peer: Peer, seconds: float, device: torch.device) -> Iterator[Row]:
    """Pass and measurements, or a note why there are none."""
    functions: dict[str, Callable[[], object]] = {}
    for name in ("forward", "training"):
        reason = peer.refusal(case, name, device)
        if reason is None:
            functions = functions or peer_passes(problem, peer)
            try:
                yield {"pass": name, **measured(functions[name], case.elements, seconds, device), "note": ""}
                continue
            except torch.OutOfMemoryError:
                reason = "runs out of memory"
        yield {"pass": name, **dict.fromkeys(MEASUREMENTS, ""), "note": f"not run: {reason}"}


def gate(backends: Sequence[str], device: torch.device) -> None:
    """No number on red: every backend must pass its self-test first."""
    for backend in backends:
        if backend == "reference":
            continue
        reason = BACKENDS[backend].unavailable_reason(device)
        if reason is not None:
            raise CommandError(f"backend {backend} cannot run here: {reason}")
        error, passed = self_test(backend, device)
        if not passed:
            raise CommandError(f"backend {backend} fails its self-test (error {error:.1e}); no times are taken", 1)


def check_peers(names: Sequence[str], device: torch.device) -> Iterator[tuple[str, str | None, str]]:
    """Name, why it is left out (or None), and what its rows say of the check; a compiled peer compiles here."""
    for name in names:
        peer = PEERS[name]
        start = time.perf_counter()
        problem = peer.missing(device) or peer.check(device)
        took = time.perf_counter() - start
        yield name, problem, f"within {peer.tolerance:.0e} of the reference; checked in {took:.1f} s"


def passes(problem: Problem, backend: str) -> dict[str, Callable[[], object]]:
    """Functions for "forward" (inference) and "training" (forward and backward)."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.leaves.items()}
    training = problem.with_leaves(leaves)
    cotangent = torch.ones_like(problem.x)

    def train() -> object:
        return torch.autograd.grad(training.run(backend), list(leaves.values()), cotangent)

    return {"forward": partial(problem.run, backend), "training": train}


def describe(case: Case, contender: str, name: str, bandwidth: float, device: torch.device) -> Row:
    return {
        "op": "selective_scan",
        "form": case.form,
        "backend": contender,
        "kind": "backend" if contender in BACKENDS else "peer" if contender in PEERS else "reference",
        "case": case.name,
        "grid": "x".join(map(str, case.grid)),
        "channels": case.channels,
        "state_size": case.state_size,
        "dt_rank": case.dt_rank,
        "routes": case.routes if isinstance(case.routes, str) else " ".join(case.routes),
        "dtype": "float32",
        "pass": name,
        "threads": torch.get_num_threads(),
        "elements": case.elements,
        # The floor of a forward pass; a training pass reads everything at least twice more.
        "memory_floor_ms": round(case.bytes_moved / bandwidth * 1e3 * (1 if name == "forward" else 3), 4),
        "exponentials": case.exponentials,
        "device": device.type,
    }


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
