"""What a backend is given: checked tensors of one scan, and the routes as tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanInputs:
    """Arguments of one scan. b batch, L tokens, c channels, K routes, N state size, R rank of dt, H heads.

    Two forms. S6: a decay rate for every channel and state. SSD (Mamba-2): one decay rate and one step size for a head
    of c / H neighbouring channels. A backend that has no code of its own for SSD or for a low-rank dt computes with
    :func:`medmamba_kernels.lowering.to_per_channel`.

    Attributes:
        x: (b, L, c) in raster order, as dt, B, C and dt_mask; any float dtype and strides.
        dt: step sizes before bias and softplus: (b, L, K, c), for SSD (b, L, K, H), with ``dt_weight`` (b, L, K, R).
        A: (K, c, N), negative; for SSD (K, H). Also (K, c, 1): one rate for all states of a channel.
        B: (b, L, K, N).
        C: (b, L, K, N).
        D: (K, c) or None.
        dt_bias: (K, c), for SSD (K, H), or None.
        dt_weight: (K, c, R), for SSD (K, H, R), or None.
        dt_mask: (b, L) bool or None; False = the token is not read and passes the state unchanged.
        order: (K, L) int32 on the CPU, contiguous; raster index read at each step, every row a permutation.
        starts: (K, L) bool on the CPU, contiguous, or None; True = the state is zero before this step.
        dt_softplus: apply softplus to dt + dt_bias.
        merge: "sum" or "none".
        final_state: return the state after the last step of every route as well.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    dt_weight: Tensor | None
    dt_mask: Tensor | None
    order: Tensor
    starts: Tensor | None
    dt_softplus: bool = True
    merge: str = "sum"
    final_state: bool = False

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """x, dt, A, B, C, D, dt_bias, dt_weight: what has a gradient, in the order in which gradients are returned."""
        return (self.x, self.dt, self.A, self.B, self.C, self.D, self.dt_bias, self.dt_weight)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(b, L, c, K, N)."""
        batch, length, channels = self.x.shape
        _, _, routes, state_size = self.B.shape
        return batch, length, channels, routes, state_size

    @property
    def heads(self) -> int | None:
        """Number of heads of the SSD form, None for S6."""
        return self.A.shape[1] if self.A.dim() == 2 else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 input, else float32: the dtype of the state and of every sum."""
        return torch.promote_types(self.x.dtype, torch.float32)

    def output_shape(self) -> tuple[int, ...]:
        """Shape of y: (b, L, c) for merge "sum", (b, K, L, c) for "none"."""
        batch, length, channels, routes, _ = self.sizes
        return (batch, length, channels) if self.merge == "sum" else (batch, routes, length, channels)

    def final_shape(self) -> tuple[int, ...]:
        """Shape of the final state: (b, K, c, N), or (0,) when it is not asked for."""
        batch, _, channels, routes, state_size = self.sizes
        return (batch, routes, channels, state_size) if self.final_state else (0,)

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
            dt_weight=None if self.dt_weight is None else self.dt_weight.to(dtype),
        )


class BadStepError(ValueError):
    """A step size is negative, NaN or infinite; the text says where and what to look for."""


def bad_step_error(inputs: ScanInputs, dt: Tensor, dt_bias: Tensor | None) -> BadStepError:
    """What is wrong with a step size that is negative, NaN or infinite, and where the first one is.

    Args:
        inputs: the scan.
        dt: (b, L, K, c or H) raw steps, with a low-rank dt multiplied out.
        dt_bias: (K, c or H) or None.
    """
    steps = dt if dt_bias is None else dt + dt_bias
    if inputs.dt_softplus:
        steps = torch.nn.functional.softplus(steps)
    bad = ~((steps >= 0) & (steps < torch.inf))
    if inputs.dt_mask is not None:
        bad &= inputs.dt_mask[:, :, None, None]
    where = bad.nonzero()
    after = " after bias and softplus" if inputs.dt_softplus else " after bias"
    if not len(where):  # a rounding apart: the kernel saw one, this did not
        return BadStepError(f"dt must be finite and not negative{after}")
    sample, token, route, column = where[0].tolist()
    name = "head" if inputs.heads is not None else "channel"
    return BadStepError(
        f"dt must be finite and not negative{after}; {len(where)} of {steps.numel()} steps are not, the first at "
        f"sample {sample}, token {token}, route {route}, {name} {column}: {steps[sample, token, route, column]:g}. "
        "Look for NaN or infinity in the input volume and in the weights before the scan"
    )
