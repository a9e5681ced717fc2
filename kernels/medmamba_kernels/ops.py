"""The public scan: checks its arguments, chooses a backend, and is one operator for torch.

The operator ``medmamba::selective_scan`` and its gradient ``medmamba::selective_scan_backward`` are registered
with torch.library (fake kernels for torch.compile, autograd, vmap), so compiled networks see one node each. Routes
travel as text and tables are looked up inside, which keeps the graph free of per-voxel index tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

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
    """Selective state-space scan of a volume along several routes, read in place.

    For every route k, with t running along the route::

        d_t = softplus(dt_t + dt_bias)    h_t = exp(d_t A) * h_{t-1} + d_t x_t B_t^T    y_t = h_t C_t + D x_t

    A has one of two forms: a rate for every channel and state (S6, Mamba), or one rate for each of H heads of c / H
    neighbouring channels (SSD, Mamba-2), where dt and its bias belong to heads as well.

    Shapes: b batch, L = D*H*W tokens in raster order of ``grid`` (W fastest), c channels, K routes, N state size,
    R rank of dt, H heads. All floating tensors may be float64, float32, bfloat16 or float16 and have any strides; they
    must be on one device. The state is kept in float32 (float64 for float64 ``x``).

    Args:
        x: (b, L, c) input, channels last.
        dt: (b, L, K, c) step sizes before bias and softplus; (b, L, K, H) in SSD; or (b, L, K, R) with ``dt_weight``.
        A: (K, c, N) decay rates, negative; (K, H) makes it the SSD form. H divides c.
        B: (b, L, K, N) input weights of the state.
        C: (b, L, K, N) output weights of the state. For N = 1, ones without D give the state itself.
        D: (K, c) weights of the direct path, or None.
        routes: name of a set in ``ROUTE_SETS`` or K routes (see :mod:`medmamba_kernels.routes`).
        grid: (D, H, W); (1, H, W) for an image.
        dt_bias: (K, c), in SSD (K, H), added to ``dt``, or None.
        dt_weight: (K, c, R), in SSD (K, H, R), projection of a low-rank ``dt``, or None.
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
        BadStepError: on the CPU, a step d_t that is negative, NaN or infinite (elsewhere the answer would cost a wait
            for the device: it spreads). A ValueError too.
        BackendError: the named backend cannot run here.

    Source: Gu & Dao, "Mamba", 2023, arXiv:2312.00752, eq. 2 and section 3.2 (Euler step on B, exponential on A);
    Dao & Gu, "Transformers are SSMs", 2024, arXiv:2405.21060, section 5 (SSD: scalar A per head);
    several routes per block: Liu et al., "VMamba", 2024, arXiv:2401.10166.
    """
    tensors = (x, dt, A, B, C, D, dt_bias, dt_weight)
    return _call(tensors, dt_mask, routes, grid, dt_softplus, merge, False, backend)[0]


def selective_scan_with_state(
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
) -> tuple[Tensor, Tensor]:
    """As :func:`selective_scan`, and the state after the last step of every route.

    Returns:
        y as from :func:`selective_scan`, and the states h (b, K, c, N) in float32 (float64 for float64 ``x``), which
        take part in the gradient. A route with resets ends with the state of its last segment.
    """
    tensors = (x, dt, A, B, C, D, dt_bias, dt_weight)
    return _call(tensors, dt_mask, routes, grid, dt_softplus, merge, True, backend)


Differentiable = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _call(
    tensors: Differentiable,
    dt_mask: Tensor | None,
    routes: str | Sequence[str | Route],
    grid: Sequence[int],
    dt_softplus: bool,
    merge: str,
    final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    resolved = resolve_routes(routes)
    sizes = checked_grid(grid)
    if merge not in MERGES:
        raise ValueError(f"unknown merge {merge!r}; known: {', '.join(MERGES)}")
    _check(*tensors, dt_mask, len(resolved), sizes)
    y, _, final = torch.ops.medmamba.selective_scan(
        *tensors,
        dt_mask,
        " ".join(str(route) for route in resolved),
        list(sizes),
        dt_softplus,
        "none" if merge == "none" else "sum",
        final_state,
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
        choose_backend(backend, tensors[0].device),
    )
    return (y / len(resolved) if merge == "mean" else y), final


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
    if A.dim() not in (2, 3) or A.shape[-1] < 1:
        raise ValueError(
            f"A must be (routes, channels, state size), or (routes, heads) for SSD, got shape {tuple(A.shape)}"
        )
    if B.dim() != 4 or B.shape[-1] < 1:
        raise ValueError(f"B must be (batch, L, routes, state size), got shape {tuple(B.shape)}")
    state_size = B.shape[-1]
    steps = channels  # step sizes per token: one for every channel, or for every head
    if A.dim() == 2:
        steps = A.shape[1]
        if channels % steps:
            raise ValueError(f"A has {steps} heads, which must divide the {channels} channels of x")
    width = steps
    if dt_weight is not None:
        if dt_weight.dim() != 3 or dt_weight.shape[-1] < 1:
            raise ValueError(f"dt_weight must be (routes, {steps}, rank), got shape {tuple(dt_weight.shape)}")
        width = dt_weight.shape[-1]
    expected = {
        "dt": (dt, (batch, length, routes, width)),
        "A": (A, (routes, channels, state_size) if A.dim() == 3 else (routes, steps)),
        "B": (B, (batch, length, routes, state_size)),
        "C": (C, (batch, length, routes, state_size)),
        "D": (D, (routes, channels)),
        "dt_bias": (dt_bias, (routes, steps)),
        "dt_weight": (dt_weight, (routes, steps, width)),
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


# Shared by the operator and its gradient: a schema must be spelled out, and is read from these annotations.
def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    dt_mask: Tensor | None,
    routes: str,
    grid: Sequence[int],
    dt_softplus: bool,
    merge: str,
    final_state: bool,
) -> ScanInputs:
    table = route_table(_routes_from_text(routes), checked_grid(grid))
    tables = (table.order, table.starts)
    return ScanInputs(x, dt, A, B, C, D, dt_bias, dt_weight, dt_mask, *tables, dt_softplus, merge, final_state)


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    dt_mask: Tensor | None,
    routes: str,
    grid: Sequence[int],
    dt_softplus: bool,
    merge: str,
    final_state: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _inputs(x, dt, A, B, C, D, dt_bias, dt_weight, dt_mask, routes, grid, dt_softplus, merge, final_state)
    with _full_precision(x):
        y, states, final = BACKENDS[backend].forward(inputs, save_states=save_states)
    return y.to(_output_dtype(x)), states, final


def _scan_fake(  # type: ignore[no-untyped-def]
    x, dt, A, B, C, D, dt_bias, dt_weight, dt_mask, routes, grid, dt_softplus, merge, final_state, save_states, backend
):
    batch, length, channels = x.shape
    count, state_size = B.shape[2:]
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(
        (batch, length, channels) if merge == "sum" else (batch, count, length, channels),
        dtype=_output_dtype(x),
    )
    shape = (0,)
    if save_states:
        shape = BACKENDS[backend].states_shape(batch, length, count, channels, state_size, x.device.type)
    final_shape = (batch, count, channels, state_size) if final_state else (0,)
    return y, x.new_empty(shape, dtype=compute_dtype), x.new_empty(final_shape, dtype=compute_dtype)


def _scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    dt_mask: Tensor | None,
    routes: str,
    grid: Sequence[int],
    dt_softplus: bool,
    merge: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(
        x, dt, A, B, C, D, dt_bias, dt_weight, dt_mask, routes, grid, dt_softplus, merge, dfinal is not None
    )
    with _full_precision(x):
        gradients = BACKENDS[backend].backward(inputs, dy, dfinal, states)
    # An operator returns tensors only: an absent input answers with an empty one.
    return tuple(
        x.new_empty(0) if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs.differentiable, strict=True)
    )  # type: ignore[return-value]


def _scan_backward_fake(  # type: ignore[no-untyped-def]
    dy, dfinal, states, x, dt, A, B, C, D, dt_bias, dt_weight, dt_mask, routes, grid, dt_softplus, merge, backend
):
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, dt, A, B, C, D, dt_bias, dt_weight)
    )


_DIFFERENTIABLE = 8  # x, dt, A, B, C, D, dt_bias, dt_weight


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, routes, grid, dt_softplus, merge, final_state, _, backend = inputs
    states = output[1]
    ctx.save_for_backward(*tensors, states)
    ctx.options = (routes, grid, dt_softplus, merge, backend)
    ctx.final_state = final_state
    ctx.mark_non_differentiable(states)


def _autograd(ctx, dy, _states_gradient, dfinal):  # type: ignore[no-untyped-def]
    *tensors, states = ctx.saved_tensors
    gradients = torch.ops.medmamba.selective_scan_backward(
        dy, dfinal if ctx.final_state else None, states, *tensors, *ctx.options
    )
    present = [g if t is not None else None for g, t in zip(gradients, tensors[:_DIFFERENTIABLE], strict=True)]
    return (*present, *[None] * 8)


_PER_SAMPLE = (0, 1, 3, 4, 8)  # positions of x, dt, B, C, dt_mask: they have a batch axis


def _scan_vmap(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    """One more batch axis: folded into that of the samples, or one scan after the other where weights differ."""
    count, options = info.batch_size, list(arguments[9:])
    tensors = [
        t if t is None or d is None else t.movedim(d, 0) for t, d in zip(arguments[:9], in_dims[:9], strict=True)
    ]
    is_mapped = [d is not None for d in in_dims[:9]]
    options[-2] = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)  # save_states
    if any(mapped and i not in _PER_SAMPLE for i, mapped in enumerate(is_mapped)):
        results = [
            torch.ops.medmamba.selective_scan(
                *[t[v] if m else t for t, m in zip(tensors, is_mapped, strict=True)], *options
            )
            for v in range(count)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)
    for i in _PER_SAMPLE:
        t = tensors[i]
        if t is not None:
            tensors[i] = (t if is_mapped[i] else t.expand(count, *t.shape)).flatten(0, 1)
    y, states, final = torch.ops.medmamba.selective_scan(*tensors, *options)
    y, final = (t.unflatten(0, (count, -1)) if t.numel() else t for t in (y, final))
    return (y, states, final), (0, None, 0 if final.numel() else None)


_LIBRARY = torch.library.Library("medmamba", "FRAGMENT")


def _register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # Defined in a library rather than as a custom_op, which puts another layer of Python around every call.
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=[torch.Tag.pt2_compliant_tag])
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"medmamba::{name}", fake, lib=_LIBRARY)


_register("selective_scan", _scan, _scan_fake)
_register("selective_scan_backward", _scan_backward, _scan_backward_fake)
torch.library.register_autograd("medmamba::selective_scan", _autograd, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_vmap("medmamba::selective_scan", _scan_vmap, lib=_LIBRARY)
