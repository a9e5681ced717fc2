"""The public scan: checks its arguments, chooses a backend, and is one operator for torch.

The operator ``medmamba::selective_scan`` and its gradient ``medmamba::selective_scan_backward`` are registered
with torch.library (fake kernels for torch.compile, autograd), so compiled networks see one node each. Routes
travel as text and tables are looked up inside, which keeps the graph free of per-voxel index tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .backends import BACKENDS, choose_backend
from .inputs import ScanInputs
from .routes import Grid, Route, checked_grid, parse_route, resolve_routes, route_table

MERGES = ("sum", "mean", "none")


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    routes: str | Sequence[str | Route],
    grid: Sequence[int],
    dt_bias: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_softplus: bool = True,
    dt_mask: Tensor | None = None,
    merge: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """Selective state-space scan (S6) of a volume along several routes, read in place.

    For every route k, with t running along the route::

        d_t = softplus(dt_t + dt_bias)    h_t = exp(d_t A) * h_{t-1} + d_t x_t B_t^T    y_t = h_t C_t + D x_t

    Shapes: b batch, L = D*H*W tokens in raster order of ``grid`` (W fastest), c channels, K routes, N state size,
    R rank of dt. All floating tensors may be float64, float32, bfloat16 or float16 and have any strides; they must
    be on one device.

    Args:
        x: (b, L, c) input, channels last.
        dt: (b, L, K, c) step sizes before bias and softplus, or (b, L, K, R) together with ``dt_weight``.
        A: (K, c, N) decay rates, negative.
        B: (b, L, K, N) input weights of the state.
        C: (b, L, K, N) output weights of the state.
        D: (K, c) weights of the direct path, or None.
        routes: name of a set in ``ROUTE_SETS`` or K routes (see :mod:`medmamba_kernels.routes`).
        grid: (D, H, W); (1, H, W) for an image.
        dt_bias: (K, c) added to ``dt``, or None.
        dt_weight: (K, c, R) projection of a low-rank ``dt``, or None.
        dt_softplus: apply softplus; without it ``dt`` must not be negative.
        dt_mask: (b, L) bool, True for tokens that take part. Other tokens are not read: the state passes them
            unchanged, their output is 0 and so are their gradients, exactly as if they had been cut out.
        merge: "sum" or "mean" over the routes, or "none" to keep them apart.
        backend: "auto", or a name in ``BACKENDS``, which is used or raises.

    Returns:
        (b, L, c), or (b, K, L, c) for merge "none"; in raster order, in the dtype of ``x``. float16 input gives
        float32: the sum over routes and states leaves the range of float16 in practice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown route, merge or backend.
        BackendError: the named backend cannot run here.

    Source: Gu & Dao, "Mamba", 2023, arXiv:2312.00752, eq. 2 and section 3.2 (Euler step on B, exponential on A);
    several routes per block: Liu et al., "VMamba", 2024, arXiv:2401.10166.
    """
    resolved = resolve_routes(routes)
    sizes = checked_grid(grid)
    if merge not in MERGES:
        raise ValueError(f"unknown merge {merge!r}; known: {', '.join(MERGES)}")
    _check(x, dt, A, B, C, D, dt_bias, dt_weight, dt_mask, len(resolved), sizes)
    if dt_weight is not None:
        dt = torch.einsum("blkr,kcr->blkc", dt, dt_weight)
    tensors = (x, dt, A, B, C, D, dt_bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _ = _scan(
        *tensors,
        dt_mask,
        " ".join(str(route) for route in resolved),
        list(sizes),
        dt_softplus,
        "none" if merge == "none" else "sum",
        needs_grad,
        choose_backend(backend, x.device),
    )
    return y / len(resolved) if merge == "mean" else y


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    dt_mask: Tensor | None,
    routes: int,
    grid: Grid,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, L, channels), got shape {tuple(x.shape)}")
    batch, length, channels = x.shape
    if length != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"x has {length} tokens but grid {grid} has {grid[0] * grid[1] * grid[2]}")
    if batch < 1 or channels < 1:
        raise ValueError(f"x must have at least one sample and one channel, got shape {tuple(x.shape)}")
    if A.dim() != 3 or A.shape[-1] < 1:
        raise ValueError(f"A must be (routes, channels, state size), got shape {tuple(A.shape)}")
    state_size = A.shape[-1]
    width = channels if dt_weight is None else dt_weight.shape[-1]
    expected = {
        "dt": (dt, (batch, length, routes, width)),
        "A": (A, (routes, channels, state_size)),
        "B": (B, (batch, length, routes, state_size)),
        "C": (C, (batch, length, routes, state_size)),
        "D": (D, (routes, channels)),
        "dt_bias": (dt_bias, (routes, channels)),
        "dt_weight": (dt_weight, (routes, channels, width)),
        "dt_mask": (dt_mask, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} for {routes} routes, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move them to one device")
        if name == "dt_mask":
            if tensor.dtype != torch.bool:
                raise ValueError(f"dt_mask must be bool (True = the token takes part), got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor, got {tensor.dtype}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor, got {x.dtype}")


def _output_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _full_precision(x: Tensor) -> torch.autocast:
    """Autocast would turn the matrix products inside a backend into half precision: the state is float32."""
    return torch.autocast(x.device.type, enabled=False)


# Inside the operator, where torch.compile does not trace: it would ignore the cache and warn.
@lru_cache(maxsize=256)
def _routes_from_text(routes: str) -> tuple[Route, ...]:
    return tuple(parse_route(text) for text in routes.split())


def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_mask: Tensor | None,
    routes: str,
    grid: Sequence[int],
    dt_softplus: bool,
    merge: str,
) -> ScanInputs:
    table = route_table(_routes_from_text(routes), checked_grid(grid))
    return ScanInputs(x, dt, A, B, C, D, dt_bias, dt_mask, table.order, table.starts, dt_softplus, merge)


@torch.library.custom_op("medmamba::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_mask: Tensor | None,
    routes: str,
    grid: Sequence[int],
    dt_softplus: bool,
    merge: str,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = _inputs(x, dt, A, B, C, D, dt_bias, dt_mask, routes, grid, dt_softplus, merge)
    with _full_precision(x):
        y, states = BACKENDS[backend].forward(inputs, save_states=save_states)
    return y.to(_output_dtype(x)), states


@_scan.register_fake
def _scan_fake(x, dt, A, B, C, D, dt_bias, dt_mask, routes, grid, dt_softplus, merge, save_states, backend):  # type: ignore[no-untyped-def]
    batch, length, channels = x.shape
    count, _, state_size = A.shape
    y = x.new_empty(
        (batch, length, channels) if merge == "sum" else (batch, count, length, channels),
        dtype=_output_dtype(x),
    )
    shape = (0,)
    if save_states:
        shape = BACKENDS[backend].states_shape(batch, length, count, channels, state_size, x.device.type)
    return y, x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("medmamba::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_mask: Tensor | None,
    states: Tensor,
    routes: str,
    grid: Sequence[int],
    dt_softplus: bool,
    merge: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(x, dt, A, B, C, D, dt_bias, dt_mask, routes, grid, dt_softplus, merge)
    with _full_precision(x):
        gradients = BACKENDS[backend].backward(inputs, dy, states)
    # An operator returns tensors only: an absent input answers with an empty one.
    return tuple(
        x.new_empty(0) if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs.differentiable, strict=True)
    )  # type: ignore[return-value]


@_scan_backward.register_fake
def _scan_backward_fake(dy, x, dt, A, B, C, D, dt_bias, dt_mask, states, routes, grid, dt_softplus, merge, backend):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, dt, A, B, C, D, dt_bias)
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, routes, grid, dt_softplus, merge, _, backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (routes, grid, dt_softplus, merge, backend)


def _autograd(ctx, dy, _states_gradient):  # type: ignore[no-untyped-def]
    *tensors, states = ctx.saved_tensors
    gradients = _scan_backward(dy, *tensors, states, *ctx.options)
    present = [g if t is not None else None for g, t in zip(gradients, tensors[:7], strict=True)]
    return (*present, None, None, None, None, None, None, None)


_scan.register_autograd(_autograd, setup_context=_setup_context)
