"""What a core computes in, whatever its input comes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(u: Tensor) -> AbstractContextManager[object]:
    """Autocast switched off for the device of ``u``: matrix products stay in the dtype of their arguments."""
    # The meta device, on which networks are counted, has no autocast, and torch refuses to switch it off.
    return nullcontext() if u.device.type == "meta" else torch.autocast(u.device.type, enabled=False)


def float16_in_float32(u: Tensor, weight: Tensor) -> tuple[Tensor, AbstractContextManager[object]]:
    """Input, and what to compute in: float32 without autocast for float16, everything else as it is.

    For cores that multiply tokens with tokens: products of three or four of them leave the range of float16. A module
    that somebody has turned to half precision as a whole (``weight``) computes in it.
    """
    if u.dtype != torch.float16 or weight.dtype == torch.float16:
        return u, nullcontext()
    return u.float(), full_precision(u)


def at_least_float32(u: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return u.to(torch.promote_types(u.dtype, torch.float32))


def result_dtype(u: Tensor) -> torch.dtype:
    """The dtype that a core answers in: that of ``u``, but float32 for float16, whose range a sum of tokens leaves."""
    return torch.float32 if u.dtype == torch.float16 else u.dtype
