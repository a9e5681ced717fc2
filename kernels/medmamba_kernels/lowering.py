"""The SSD form and the low-rank dt as a plain S6 scan, for backends that have no code of their own for them.

The S6 form has a step size and a decay rate for every channel. Lowering spells them out before the scan, and folds the
gradients back after it::

    low rank   dt_BLKC = sum_r z_BLKR W_KCR        dz = sum_c ddt W        dW = sum_BL ddt z
    SSD        dt of head h for each of its c / H channels, A_Kh for each of its channels and states; gradients summed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .inputs import ScanInputs

Gradients = tuple[Tensor | None, ...]


def to_per_channel(inputs: ScanInputs) -> ScanInputs:
    """The same scan with dt (b, L, K, c), A (K, c, N) or (K, c, 1), and no ``dt_weight``."""
    return _expand_heads(project_dt(inputs))


def project_dt(inputs: ScanInputs) -> ScanInputs:
    """The same scan with the low-rank dt multiplied out, in the compute dtype."""
    if inputs.dt_weight is None:
        return inputs
    z, weight = (t.to(inputs.compute_dtype) for t in (inputs.dt, inputs.dt_weight))
    return replace(inputs, dt=torch.einsum("blkr,kcr->blkc", z, weight), dt_weight=None)


def _expand_heads(inputs: ScanInputs) -> ScanInputs:
    if inputs.heads is None:
        return inputs
    width = inputs.x.shape[-1] // inputs.heads
    return replace(
        inputs,
        dt=inputs.dt.repeat_interleave(width, -1),
        A=inputs.A.repeat_interleave(width, -1).unsqueeze(-1),
        dt_bias=None if inputs.dt_bias is None else inputs.dt_bias.repeat_interleave(width, -1),
    )


def from_per_channel(inputs: ScanInputs, gradients: Sequence[Tensor | None]) -> Gradients:
    """Gradients of ``inputs.differentiable``, from those of ``to_per_channel(inputs)``.

    Args:
        inputs: the scan as it was asked for.
        gradients: of x, dt, A, B, C, D, dt_bias in the S6 form; in SSD those of A may be (K, c, 1).
    """
    dx, ddt, dA, dB, dC, dD, ddt_bias = gradients[:7]
    assert ddt is not None
    assert dA is not None
    heads = inputs.heads
    if heads is not None:
        ddt = _sum_channels(ddt, heads)
        dA = _sum_channels(dA.sum(-1), heads)
        ddt_bias = None if ddt_bias is None else _sum_channels(ddt_bias, heads)
    return dx, *fold_projection(inputs, ddt, (dA, dB, dC, dD, ddt_bias))


def _sum_channels(gradient: Tensor, heads: int) -> Tensor:
    return gradient.unflatten(-1, (heads, -1)).sum(-1)


def fold_projection(inputs: ScanInputs, ddt: Tensor, others: Sequence[Tensor | None]) -> Gradients:
    """(gradient of dt, *others, gradient of dt_weight), from the gradient ``ddt`` of the projected step sizes."""
    if inputs.dt_weight is None:
        return ddt, *others, None
    z = inputs.dt.to(ddt.dtype)
    if inputs.dt_mask is not None:
        # ddt is 0 there, but 0 times what a masked token holds may be NaN.
        z = torch.where(inputs.dt_mask[:, :, None, None], z, torch.zeros((), dtype=z.dtype, device=z.device))
    dz = torch.einsum("blkc,kcr->blkr", ddt, inputs.dt_weight.to(ddt.dtype))
    dW = torch.einsum("blkc,blkr->kcr", ddt, z)
    return dz, *others, dW
