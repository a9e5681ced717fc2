"""Problems, comparisons and a self-test of the scan, shared by the tests, the benchmarks and ``medmamba doctor``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import selective_scan, selective_scan_with_state
from .reference import selective_scan_reference
from .routes import Route, resolve_routes

# Largest accepted RMS error relative to the RMS of the float64 reference on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: {"y": 1e-12, "x": 1e-12, "state": 1e-12, "other": 1e-11},
    torch.float32: {"y": 1e-6, "x": 1e-6, "state": 1e-6, "other": 1e-5},
    torch.bfloat16: {"y": 3e-3, "x": 1e-2, "state": 3e-3, "other": 1e-2},
}

GRADIENT_NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "dt_weight")


@dataclass(frozen=True)
class Problem:
    """Arguments of one call of the scan."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    dt_weight: Tensor | None
    dt_mask: Tensor | None
    routes: tuple[Route, ...]
    grid: tuple[int, int, int]
    merge: str = "sum"
    dt_softplus: bool = True
    with_state: bool = False

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The floating tensors, by name."""
        return {name: getattr(self, name) for name in GRADIENT_NAMES if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Problem:
        """The same numbers in another floating dtype or on another device."""
        moved = {name: leaf.detach().to(device=device, dtype=dtype) for name, leaf in self.leaves.items()}
        mask = None if self.dt_mask is None else self.dt_mask.to(device)
        return replace(self.with_leaves(moved), dt_mask=mask)

    def with_leaves(self, leaves: Mapping[str, Any]) -> Problem:
        """The same problem with these tensors in the place of those of the same name."""
        return replace(self, **leaves)

    def results(self, backend: str) -> dict[str, Tensor]:
        """y, and the final "state" if asked for; ``backend`` is "reference" or a name of ``BACKENDS``."""
        options: dict[str, Any] = {
            "routes": self.routes,
            "grid": self.grid,
            "dt_bias": self.dt_bias,
            "dt_weight": self.dt_weight,
            "dt_mask": self.dt_mask,
            "merge": self.merge,
            "dt_softplus": self.dt_softplus,
        }
        arguments = (self.x, self.dt, self.A, self.B, self.C, self.D)
        if backend == "reference":
            y, state = selective_scan_reference(*arguments, **options)
        elif self.with_state:
            y, state = selective_scan_with_state(*arguments, **options, backend=backend)
        else:
            return {"y": selective_scan(*arguments, **options, backend=backend)}
        return {"y": y, "state": state} if self.with_state else {"y": y}

    def run(self, backend: str) -> Tensor:
        """y alone."""
        return self.results(backend)["y"]

    def run_with_gradients(self, backend: str, cotangents: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results and the gradients of ``sum(result * cotangent)``, keyed by name."""
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves.items()}
        results = self.with_leaves(leaves).results(backend)
        total = torch.stack([(result * cotangents[name].to(result)).sum() for name, result in results.items()]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        return {
            **{name: result.detach() for name, result in results.items()},
            **dict(zip(leaves, gradients, strict=True)),
        }


def make_problem(
    grid: Sequence[int] = (3, 4, 5),
    *,
    batch: int = 1,
    channels: int = 4,
    state_size: int = 4,
    routes: str | Sequence[str | Route] = "raster6",
    merge: str = "sum",
    heads: int | None = None,
    dt_rank: int | None = None,
    with_state: bool = False,
    mask_fraction: float = 0.0,
    dt_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A random problem of ordinary magnitude: decays from slow to fast, steps around softplus(-2).

    Args:
        grid: (D, H, W).
        heads: number of heads of the SSD form, which must divide ``channels``; None for S6.
        dt_rank: rank of dt, which then comes with ``dt_weight``; None for dt itself.
        with_state: ask for the final state too.
        mask_fraction: share of tokens that are masked out; 0 gives no mask.
        dt_scale: factor on dt before the softplus.
        dtype: dtype of every floating tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    resolved = resolve_routes(routes)
    length, count = math.prod(grid), len(resolved)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(batch, length, generator=generator) >= mask_fraction if mask_fraction > 0 else None
    steps = heads or channels
    return Problem(
        x=normal(batch, length, channels),
        dt=dt_scale * normal(batch, length, count, dt_rank or steps),
        A=-torch.exp(normal(count, heads) if heads else normal(count, channels, state_size)),
        B=normal(batch, length, count, state_size),
        C=normal(batch, length, count, state_size),
        D=normal(count, channels),
        dt_bias=normal(count, steps) - 2,
        dt_weight=normal(count, steps, dt_rank) / math.sqrt(dt_rank) if dt_rank else None,
        dt_mask=mask,
        routes=resolved,
        grid=tuple(grid),  # type: ignore[arg-type]
        merge=merge,
        with_state=with_state,
    )


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of the expectation (absolute where the expectation is zero)."""
    got64, expected64 = got.double(), expected.double()
    scale = expected64.square().mean().sqrt().item()
    error = (got64 - expected64).square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """AssertionError unless the relative RMS error is at most ``tolerance`` (NaN fails)."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    error = relative_rms(got, expected)
    assert error <= tolerance, f"{name}: relative RMS error {error:.2e} above {tolerance:.0e}"


def check_against_reference(problem: Problem, backend: str, dtype: torch.dtype, seed: int = 1) -> None:
    """Compare values and all gradients of a backend in ``dtype`` with the float64 reference on the same numbers."""
    rounded = problem.to(dtype)
    exact = rounded.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    cotangents = {
        name: torch.randn(result.shape, generator=generator, dtype=torch.float64).to(dtype).double()
        for name, result in exact.results("reference").items()
    }
    expected = exact.run_with_gradients("reference", cotangents)
    got = rounded.run_with_gradients(backend, cotangents)
    limits = TOLERANCES[dtype]
    for name, value in expected.items():
        assert_close(name, got[name], value, limits.get(name, limits["other"]))


class SelfTest(NamedTuple):
    """Outcome of :func:`self_test`."""

    error: float  # largest relative RMS error of y
    passed: bool  # y and all gradients are within the tolerances


def self_test(backend: str, device: str | torch.device = "cpu") -> SelfTest:
    """Run a backend in float32 on three small odd volumes and compare with the float64 reference on the CPU.

    The volumes are longer than a chunk of any backend; two have resets and a mask, one is in SSD form.

    Raises:
        BackendError: the backend cannot run on this device.
    """
    limits = TOLERANCES[torch.float32]
    outcome = SelfTest(0.0, True)
    for problem in (
        make_problem((3, 5, 7), channels=20, state_size=16),
        make_problem((2, 6, 7), channels=5, state_size=3, routes=["dhw:reset=plane", "wdh:reverse"], mask_fraction=0.3),
        make_problem(
            (3, 5, 7), channels=36, state_size=17, heads=2, routes=["dhw", "wdh:reverse:reset=plane"], mask_fraction=0.3
        ),
    ):
        exact = problem.to(torch.float32).to(torch.float64)
        cotangents = {"y": torch.randn(exact.x.shape, generator=torch.Generator().manual_seed(1)).double()}
        expected = exact.run_with_gradients("reference", cotangents)
        got = problem.to(torch.float32, device).run_with_gradients(backend, cotangents)
        errors = {name: relative_rms(got[name].cpu(), value) for name, value in expected.items()}
        within = all(error <= limits.get(name, limits["other"]) for name, error in errors.items())
        outcome = SelfTest(max(outcome.error, errors["y"]), outcome.passed and within)
    return outcome
