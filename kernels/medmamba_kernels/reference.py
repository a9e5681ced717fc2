"""The definition of the scan in plain PyTorch: slow, any device, works in float64, differentiable by autograd.

Per route k, with tokens numbered in the order of the route (Gu & Dao, "Mamba", 2023, arXiv:2312.00752, eq. 2a-2b
with the simplified discretisation of its section 3.2; routes as in Liu et al., "VMamba", 2024, arXiv:2401.10166)::

    dt_t = softplus(raw_t + bias)        h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

In the SSD form (Dao & Gu, "Transformers are SSMs", 2024, arXiv:2405.21060) A and dt are scalars per head of channels.
Everything else in this package is a faster way to get these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .routes import Route, checked_grid, resolve_routes


def selective_scan_reference(
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
) -> tuple[Tensor, Tensor]:
    """Multi-route selective scan, one token after the other; see :func:`medmamba_kernels.selective_scan_with_state`.

    All tensors are used in their own dtype (give float64 for a reference). Same arguments, shapes and results (y and
    the final states) as the public op; arguments are not checked.
    """
    resolved = resolve_routes(routes)
    channels = x.shape[-1]
    if dt_weight is not None:
        dt = torch.einsum("blkr,kcr->blkc", dt, dt_weight)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    if A.dim() == 2:  # SSD: one step size and one decay rate for all channels and states of a head
        per_head = channels // A.shape[1]
        dt = dt.repeat_interleave(per_head, dim=-1)
        A = A.repeat_interleave(per_head, dim=-1).unsqueeze(-1).expand(-1, -1, B.shape[-1])
    results = [
        _scan_one_route(
            x,
            dt[:, :, k],
            A[k],
            B[:, :, k],
            C[:, :, k],
            None if D is None else D[k],
            dt_mask,
            route.order(checked_grid(grid)).tolist(),
            route.starts(checked_grid(grid)).tolist(),
        )
        for k, route in enumerate(resolved)
    ]
    y_BKLC = torch.stack([y for y, _ in results], dim=1)
    states = torch.stack([state for _, state in results], dim=1)
    if merge == "none":
        return y_BKLC, states
    return (y_BKLC.sum(1) if merge == "sum" else y_BKLC.mean(1)), states


def _scan_one_route(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    mask: Tensor | None,
    order: list[int],
    starts: list[bool],
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    h = x.new_zeros(batch, channels, A.shape[-1])
    outputs: list[Tensor] = [x.new_zeros(0)] * length
    for token, is_start in zip(order, starts, strict=True):
        if is_start:
            h = torch.zeros_like(h)
        decay = torch.exp(dt[:, token, :, None] * A)
        drive = (dt[:, token] * x[:, token]).unsqueeze(-1) * B[:, token, None, :]
        new_h = decay * h + drive
        y = (new_h * C[:, token, None, :]).sum(-1)
        if D is not None:
            y = y + D * x[:, token]
        if mask is not None:
            visible = mask[:, token].view(batch, 1)
            new_h = torch.where(visible.unsqueeze(-1), new_h, h)
            y = torch.where(visible, y, torch.zeros_like(y))
        h = new_h
        outputs[token] = y
    return torch.stack(outputs, dim=1), h
