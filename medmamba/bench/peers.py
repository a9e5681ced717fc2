"""What people scan volumes with where they do not have this package, timed beside its backends.

A peer reads one-dimensional sequences, so it is used as its users do it: x is copied once per route (cross-scan), the
copies are scanned, and the results are brought back into the volume's order and added (cross-merge). These copies are
part of the time and of the memory; with a single route in raster order there are none. dt, B and C are handed over in
the order of the routes and in the layout that the peer wants, free of charge: its users compute them from the copies.

    published   the recurrence as published with Mamba, in eager torch: all decays and inputs, then a loop over L
    mambapy     the parallel scan of mamba.py (PyPI: mambapy), one call per route
    compiled    a chunked scan in torch, chunks of 32 tokens side by side, compiled by torch.compile
    mamba_ssm   the CUDA kernels of mamba_ssm, the routes as its groups

Every peer is checked against the float64 reference, values and gradients, before it is timed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.bench.cases import Case
from medmamba.bench.measure import CPU, available_bytes
from medmamba_kernels.routes import Grid, Route
from medmamba_kernels.testing import Problem, make_problem, relative_rms

LEAVES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
CHUNK = 32
#: Elements above which the published recurrence is not run: about a microsecond each.
PUBLISHED_ELEMENTS = 2**25
#: Its training costs 1 to 3 ns per state and *pair* of tokens, because the gradient of every step fills a whole buffer.
PUBLISHED_PAIRS = 2**32


@dataclass(frozen=True)
class Sequences:
    """A problem in the hands of a peer: x as a volume, dt, B and C along every route.

    Attributes:
        x: (b, L, c) in raster order.
        dt: (b, K, L, c).
        A: (K, c, N).
        B: (b, K, L, N).
        C: (b, K, L, N).
        D: (K, c).
        dt_bias: (K, c).
        routes: K plain rasters.
        grid: (D, H, W).
        channels_first: the last two axes of x, dt, B and C are swapped.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    routes: tuple[Route, ...]
    grid: Grid
    channels_first: bool

    @classmethod
    def of(cls, problem: Problem, channels_first: bool) -> Sequences:
        """Differentiable, so that gradients can be compared in the problem's own order."""
        orders = [route.order(problem.grid).to(problem.x.device) for route in problem.routes]

        def along_routes(tokens: Tensor) -> Tensor:
            copies = torch.stack([tokens[:, order, k] for k, order in enumerate(orders)], 1)
            return copies.mT.contiguous() if channels_first else copies

        assert problem.D is not None
        assert problem.dt_bias is not None
        return cls(
            problem.x.mT.contiguous() if channels_first else problem.x,
            along_routes(problem.dt),
            problem.A,
            along_routes(problem.B),
            along_routes(problem.C),
            problem.D,
            problem.dt_bias,
            problem.routes,
            problem.grid,
            channels_first,
        )

    def leaves(self) -> Sequences:
        """The same numbers, detached and asking for gradients."""
        return replace(self, **{name: getattr(self, name).detach().requires_grad_() for name in LEAVES})

    @property
    def first_axis(self) -> int:
        """First axis of the volume in x."""
        return 2 if self.channels_first else 1


@dataclass(frozen=True)
class Peer:
    """A way to scan.

    Attributes:
        scan: (the (b, K, L, c) copies of x, everything else) -> (b, K, L, c); channels first if so wanted.
        missing: why it cannot run on a device, or None.
        channels_first: layout of all token tensors, see ``Sequences``.
        tolerance: largest relative RMS error of y that is accepted; ten times that for a gradient.
        held: (b, L, c, N) tensors of float32 that exist at the same time, as measured: pass -> (always, per route).
        most_elements: larger cases are not run.
        most_pairs: as the above for training, in states x pairs of tokens.
    """

    scan: Callable[[Tensor, Sequences], Tensor]
    missing: Callable[[torch.device], str | None]
    channels_first: bool
    tolerance: float
    held: Mapping[str, tuple[float, float]]
    most_elements: float = math.inf
    most_pairs: float = math.inf

    def run(self, sequences: Sequences) -> Tensor:
        """y of all routes, added: (b, L, c) in raster order, or (b, c, L)."""
        routes, grid, axis = sequences.routes, sequences.grid, sequences.first_axis
        if [str(route) for route in routes] == ["dhw"]:
            return self.scan(sequences.x.unsqueeze(1), sequences).squeeze(1)
        copies: Tensor = _CrossScan.apply(sequences.x, routes, grid, axis)
        return _CrossMerge.apply(self.scan(copies, sequences), routes, grid, axis)

    def check(self, device: torch.device) -> str | None:
        """What is wrong with its values or gradients on a small odd volume, or None."""
        problem = make_problem((3, 5, 7), channels=20, state_size=16)
        rounded = problem.to(torch.float32, device)
        leaves = {name: leaf.requires_grad_() for name, leaf in rounded.leaves.items()}
        sequences = Sequences.of(rounded.with_leaves(leaves), self.channels_first)
        y = self.run(sequences)
        y = y.mT if self.channels_first else y
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(y, list(leaves.values()), cotangent.to(device))
        with torch.no_grad():
            forward = self.run(sequences)
        got = {"y": y, "y without gradients": forward.mT if self.channels_first else forward}
        got |= dict(zip(leaves, gradients, strict=True))
        expected = (
            problem.to(torch.float32).to(torch.float64).run_with_gradients("reference", {"y": cotangent.double()})
        )
        expected["y without gradients"] = expected["y"]
        for name, value in got.items():
            limit = self.tolerance * (1 if name.startswith("y") else 10)
            error = relative_rms(value.detach().cpu(), expected[name])
            if not error <= limit:
                return f"its {name} differs from the reference by {error:.1e}, more than {limit:.0e}"
        return None

    def refusal(self, case: Case, pass_name: str, device: torch.device = CPU) -> str | None:
        """Why a case is not run, or None."""
        if case.form != "s6":
            return f"is not used for the {case.form} form here"
        if case.dt_rank:
            return "takes step sizes, not their factors"
        if not all(is_plain_raster(route) for route in case.resolved_routes):
            return "reads plain rasters only"
        if case.elements > self.most_elements:
            return "takes about a microsecond per element"
        if pass_name == "training" and case.length * case.elements * case.state_size > self.most_pairs:
            return "has a backward that is quadratic in L"
        always, per_route = self.held[pass_name]
        tensors = always + per_route * len(case.resolved_routes)
        needed = tensors * case.length * case.channels * case.state_size * 4
        available = available_bytes(device)
        if available is not None and needed > 0.8 * available:
            return f"needs about {needed / 2**30:.0f} GiB"
        return None


def is_plain_raster(route: Route) -> bool:
    """Whether a route is a permutation of the axes, maybe reversed: what cross-scans know."""
    return route == Route(route.axes, reverse=route.reverse)


def peer_passes(problem: Problem, peer: Peer) -> dict[str, Callable[[], object]]:
    """As ``scan.passes``, for a peer."""
    with torch.no_grad():
        sequences = Sequences.of(problem, peer.channels_first)
    training = sequences.leaves()
    leaves = [getattr(training, name) for name in LEAVES]
    cotangent = torch.ones_like(sequences.x)

    def train() -> object:
        return torch.autograd.grad(peer.run(training), leaves, cotangent)

    return {"forward": lambda: peer.run(sequences), "training": train}


# --- copies ---------------------------------------------------------------------------------------------------------


def _axes(route: Route, axis: int) -> list[int]:
    """Order of the axes of a (b, D, H, W, c) or (b, c, D, H, W) volume in which the route visits them."""
    visited = [axis + "dhw".index(letter) for letter in route.axes]
    return [*range(axis), *visited, *range(axis + 3, 5)]


def _copies(x: Tensor, routes: tuple[Route, ...], grid: Grid, axis: int) -> Tensor:
    """(b, L, c) -> (b, K, L, c): x along every route, written once; axis is the first of the volume."""
    volume = x.unflatten(axis, grid)
    copies = x.new_empty(x.shape[0], len(routes), *x.shape[1:])
    for k, route in enumerate(routes):
        read = volume.permute(_axes(route, axis))
        if route.reverse:
            read = read.flip([axis, axis + 1, axis + 2])
        copies[:, k].unflatten(axis, read.shape[axis : axis + 3]).copy_(read)
    return copies


def _sum_of_copies(copies: Tensor, routes: tuple[Route, ...], grid: Grid, axis: int) -> Tensor:
    """(b, K, L, c) along the routes -> (b, L, c), added in the volume's own order."""
    total = torch.zeros_like(copies[:, 0])
    volume = total.unflatten(axis, grid)
    for k, route in enumerate(routes):
        into = volume.permute(_axes(route, axis))
        values = copies[:, k].flip(axis) if route.reverse else copies[:, k]
        into += values.unflatten(axis, into.shape[axis : axis + 3])
    return total


class _CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: tuple[Route, ...], grid: Grid, axis: int) -> Tensor:
        ctx.how = (routes, grid, axis)
        return _copies(x, *ctx.how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _sum_of_copies(gradient, *ctx.how), None, None, None


class _CrossMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: Tensor, routes: tuple[Route, ...], grid: Grid, axis: int) -> Tensor:
        ctx.how = (routes, grid, axis)
        return _sum_of_copies(copies, *ctx.how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _copies(gradient, *ctx.how), None, None, None


# --- scans ----------------------------------------------------------------------------------------------------------


def _published(x: Tensor, s: Sequences) -> Tensor:
    """All exp(dt A) and dt B x as (b, K, c, L, N), then one token after the other (Gu & Dao, 2023, eq. 2)."""
    dt = F.softplus(s.dt + s.dt_bias.unsqueeze(-1))
    decay = torch.exp(dt.unsqueeze(-1) * s.A.unsqueeze(-2))
    drive = (dt * x).unsqueeze(-1) * s.B.mT.unsqueeze(2)
    h = torch.zeros_like(decay[..., 0, :])
    outputs = []
    # Indexed and not unbound, as published: the gradient of each of these selections has the size of the whole tensor.
    for t in range(x.shape[-1]):
        h = decay[..., t, :] * h + drive[..., t, :]
        outputs.append((h * s.C[..., t].unsqueeze(2)).sum(-1))
    return torch.stack(outputs, -1) + s.D.unsqueeze(-1) * x


def _mambapy(x: Tensor, s: Sequences) -> Tensor:
    """``pscan(decay, drive)`` of mamba.py: every state of (b, L, c, N), by a parallel scan over L."""
    from mambapy.pscan import pscan

    dt = F.softplus(s.dt + s.dt_bias.unsqueeze(1))
    results = []
    for k in range(x.shape[1]):
        decay = torch.exp(dt[:, k].unsqueeze(-1) * s.A[k])
        drive = (dt[:, k] * x[:, k]).unsqueeze(-1) * s.B[:, k].unsqueeze(-2)
        results.append((pscan(decay, drive) @ s.C[:, k].unsqueeze(-1)).squeeze(-1) + s.D[k] * x[:, k])
    return torch.stack(results, 1)


def _mamba_ssm(x: Tensor, s: Sequences) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    batch, routes, channels, length = x.shape
    y: Tensor = selective_scan_fn(
        x.reshape(batch, routes * channels, length),
        s.dt.reshape(batch, routes * channels, length),
        s.A.reshape(routes * channels, -1),
        s.B,
        s.C,
        s.D.reshape(-1),
        delta_bias=s.dt_bias.reshape(-1),
        delta_softplus=True,
    )
    return y.reshape(x.shape)


def _compiled(x: Tensor, s: Sequences) -> Tensor:
    """Chunks of 32 tokens side by side: local end states, the states carried from chunk to chunk, then the outputs."""
    local_ends, outputs = _compiled_parts()
    batch, routes, length, channels = x.shape
    chunks = -(-length // CHUNK)

    def chunked(tokens: Tensor) -> Tensor:
        padded = F.pad(tokens, (0, 0, 0, chunks * CHUNK - length))
        return padded.reshape(batch * chunks, CHUNK, tokens.shape[-1])

    dt = F.softplus(s.dt + s.dt_bias.unsqueeze(1))
    results = []
    for k in range(routes):
        step, drive = chunked(dt[:, k]), chunked(dt[:, k] * x[:, k])
        B, C, A = chunked(s.B[:, k]), chunked(s.C[:, k]), s.A[k]
        ends = local_ends(step, drive, B, A).unflatten(0, (batch, chunks))
        decay = torch.exp(step.sum(1).unsqueeze(-1) * A).unflatten(0, (batch, chunks))
        starts = [torch.zeros_like(ends[:, 0])]
        # A step per chunk and not per token: a few hundredths of the whole.
        for chunk_decay, end in zip(decay.unbind(1)[:-1], ends.unbind(1)[:-1], strict=True):
            starts.append(torch.addcmul(end, chunk_decay, starts[-1]))
        y = outputs(step, drive, B, C, A, torch.stack(starts, 1).flatten(0, 1))
        results.append(y.reshape(batch, chunks * CHUNK, channels)[:, :length] + s.D[k] * x[:, k])
    return torch.stack(results, 1)


def _local_ends(step: Tensor, drive: Tensor, B: Tensor, A: Tensor) -> Tensor:
    h = step.new_zeros(step.shape[0], *A.shape)
    for t in range(CHUNK):
        h = torch.exp(step[:, t, :, None] * A) * h + drive[:, t, :, None] * B[:, t, None, :]
    return h


def _outputs(step: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor) -> Tensor:
    y = []
    for t in range(CHUNK):
        h = torch.exp(step[:, t, :, None] * A) * h + drive[:, t, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(y, 1)


@cache
def _compiled_parts() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    # One compilation for all sizes: it takes minutes, and fixed sizes were no faster in a forward pass.
    return torch.compile(_local_ends, dynamic=True), torch.compile(_outputs, dynamic=True)


def _nothing_missing(device: torch.device) -> str | None:
    return None


def _mambapy_missing(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("mambapy") else "mambapy is not installed"


def _mamba_ssm_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "mamba_ssm needs a CUDA device"
    try:
        import mamba_ssm.ops.selective_scan_interface  # noqa: F401
    except Exception as error:  # its compiled parts fail in many ways when they do not fit torch
        return f"mamba_ssm cannot be imported: {error}"
    return None


def _compiler_missing(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs triton on a GPU"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and there is no {compiler}"


PEERS: dict[str, Peer] = {
    "published": Peer(
        _published,
        _nothing_missing,
        True,
        1e-5,
        {"forward": (0, 3.5), "training": (0, 13)},
        most_elements=PUBLISHED_ELEMENTS,
        most_pairs=PUBLISHED_PAIRS,
    ),
    "mambapy": Peer(_mambapy, _mambapy_missing, False, 1e-5, {"forward": (6, 0.5), "training": (6, 6)}),
    "compiled": Peer(_compiled, _compiler_missing, False, 1e-5, {"forward": (0, 0.5), "training": (2, 1.1)}),
    # Its kernels are built with fast mathematics. Its memory is estimated: it has not run here.
    "mamba_ssm": Peer(_mamba_ssm, _mamba_ssm_missing, True, 1e-4, {"forward": (0, 0.3), "training": (0, 0.6)}),
}
