"""Problems, comparisons and a self-test of the scan, shared by the tests, the benchmarks and ``medmamba doctor``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .ops import selective_scan
from .reference import selective_scan_reference
from .routes import Route, resolve_routes

# Largest accepted RMS error relative to the RMS of the float64 reference on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: {"y": 1e-12, "x": 1e-12, "other": 1e-11},
    torch.float32: {"y": 1e-6, "x": 1e-6, "other": 1e-5},
    torch.bfloat16: {"y": 3e-3, "x": 1e-2, "other": 1e-2},
}

GRADIENT_NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


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
    dt_mask: Tensor | None
    routes: tuple[Route, ...]
    grid: tuple[int, int, int]
    merge: str = "sum"
    dt_softplus: bool = True

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another floating dtype."""
        names = [name for name in GRADIENT_NAMES if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name).detach().to(dtype) for name in names})

    def run(self, backend: str) -> Tensor:
        """Result of the scan; ``backend`` is "reference" or a name of ``BACKENDS``."""
        scan = selective_scan_reference if backend == "reference" else partial(selective_scan, backend=backend)
        return scan(
            self.x,
            self.dt,
            self.A,
            self.B,
            self.C,
            self.D,
            routes=self.routes,
            grid=self.grid,
            dt_bias=self.dt_bias,
            dt_mask=self.dt_mask,
            merge=self.merge,
            dt_softplus=self.dt_softplus,
        )

    def run_with_gradients(self, backend: str, cotangent: Tensor) -> dict[str, Tensor]:
        """y and the gradients of ``sum(y * cotangent)``, keyed by name."""
        leaves = {
            name: getattr(self, name).detach().clone().requires_grad_()
            for name in GRADIENT_NAMES
            if getattr(self, name) is not None
        }
        y = replace(self, **leaves).run(backend)
        gradients = torch.autograd.grad((y * cotangent.to(y.dtype)).sum(), list(leaves.values()))
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def make_problem(
    grid: Sequence[int] = (3, 4, 5),
    *,
    batch: int = 1,
    channels: int = 4,
    state_size: int = 4,
    routes: str | Sequence[str | Route] = "raster6",
    merge: str = "sum",
    mask_fraction: float = 0.0,
    dt_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A random problem of ordinary magnitude: decays from slow to fast, steps around softplus(-2).

    Args:
        grid: (D, H, W).
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
    return Problem(
        x=normal(batch, length, channels),
        dt=dt_scale * normal(batch, length, count, channels),
        A=-torch.exp(normal(count, channels, state_size)),
        B=normal(batch, length, count, state_size),
        C=normal(batch, length, count, state_size),
        D=normal(count, channels),
        dt_bias=normal(count, channels) - 2,
        dt_mask=mask,
        routes=resolved,
        grid=tuple(grid),  # type: ignore[arg-type]
        merge=merge,
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
    shape = rounded.to(torch.float64).run("reference").shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cotangent = cotangent.to(dtype).double()
    expected = rounded.to(torch.float64).run_with_gradients("reference", cotangent)
    got = rounded.run_with_gradients(backend, cotangent)
    limits = TOLERANCES[dtype]
    for name, value in expected.items():
        assert_close(name, got[name], value, limits.get(name, limits["other"]))


def self_test(backend: str, device: str | torch.device = "cpu") -> float:
    """Relative RMS error of a backend in float32 on a small odd volume, against the float64 reference.

    Raises:
        BackendError: the backend cannot run on this device.
    """
    problem = make_problem((3, 5, 7), channels=20, state_size=16)
    expected = problem.run("reference")
    tensors = {name: getattr(problem, name).float().to(device) for name in GRADIENT_NAMES}
    return relative_rms(replace(problem, **tensors).run(backend).cpu(), expected)
