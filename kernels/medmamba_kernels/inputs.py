"""What a backend is given: checked tensors of one scan, and the routes as tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanInputs:
    """Arguments of one scan. b batch, L tokens, c channels, K routes, N state size.

    Attributes:
        x: (b, L, c) in raster order, as dt, B, C and dt_mask; any float dtype and strides.
        dt: (b, L, K, c) step sizes before bias and softplus.
        A: (K, c, N), negative.
        B: (b, L, K, N).
        C: (b, L, K, N).
        D: (K, c) or None.
        dt_bias: (K, c) or None.
        dt_mask: (b, L) bool or None; False = the token is not read and passes the state unchanged.
        order: (K, L) int32 on the CPU, contiguous; raster index read at each step, every row a permutation.
        starts: (K, L) bool on the CPU, contiguous, or None; True = the state is zero before this step.
        dt_softplus: apply softplus to dt + dt_bias.
        merge: "sum" or "none".
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    dt_mask: Tensor | None
    order: Tensor
    starts: Tensor | None
    dt_softplus: bool = True
    merge: str = "sum"

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """x, dt, A, B, C, D, dt_bias: what has a gradient, in the order in which gradients are returned."""
        return (self.x, self.dt, self.A, self.B, self.C, self.D, self.dt_bias)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(b, L, c, K, N)."""
        batch, length, channels = self.x.shape
        routes, _, state_size = self.A.shape
        return batch, length, channels, routes, state_size

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 input, else float32: the dtype of the state and of every sum."""
        return torch.promote_types(self.x.dtype, torch.float32)

    def output_shape(self) -> tuple[int, ...]:
        """Shape of y: (b, L, c) for merge "sum", (b, K, L, c) for "none"."""
        batch, length, channels, routes, _ = self.sizes
        return (batch, length, channels) if self.merge == "sum" else (batch, routes, length, channels)

    def in_compute_dtype(self) -> ScanInputs:
        """The same numbers with every floating tensor in ``compute_dtype``."""
        dtype = self.compute_dtype
        return replace(
            self,
            x=self.x.to(dtype),
            dt=self.dt.to(dtype),
            A=self.A.to(dtype),
            B=self.B.to(dtype),
            C=self.C.to(dtype),
            D=None if self.D is None else self.D.to(dtype),
            dt_bias=None if self.dt_bias is None else self.dt_bias.to(dtype),
        )
