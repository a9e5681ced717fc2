"""Selective scan on GPUs through Triton; the kernels are in ``_triton_kernels``.

The sequence of a route is cut into M chunks of T tokens, which run side by side:

1. every chunk from a zero state: the state at its end and its sum of dt, whose decay is exp(A * sum of dt);
2. the states are carried from chunk to chunk: the state every chunk starts with, saved for the backward;
3. every chunk again from its true start, now writing y.

The backward does 1 and 2 from the other end for the gradients of the states, then recomputes the states inside every
chunk and sweeps back. Volumes are read in place through the order table of the routes, 4 bytes per token and route
on the device.

The routes write to the same voxels in different orders. In a large volume every route is a launch of its own that adds
to the output of the launches before; in a small one, where a launch would not fill the GPU, all routes write a copy
each (``COPIES_BYTES`` at most), and the copies are added. Both orders of addition are fixed, there are no atomics, and
no size depends on the GPU: equal calls give equal bits.

Peak memory beside inputs and results, in bytes, for the sizes B L K C N and e = 4 (8 for float64 input):

    forward     e B K C N L / T + e B K C L / T          states (the first is saved), sums of dt
                e B K L C where all routes write copies (at most ``COPIES_BYTES``)
    backward    all of the forward again, for the gradients of the states and of x
                e P C (N + 2) (K times for copies)       partial sums of dA, dD and the bias, P <= B L / T
                128 e T R                                scratch of R <= ``PROGRAMS`` programs: 64 MiB in float32
                2 e G B L K N where G > 1                partial dB and dC: B L G <= T ``PROGRAMS``

ddt is written in the dtype of dt, dB and dC in float32 before they are cast. The order tables of the last 16 calls
that differ in routes or grid stay on the device, 4 to 5 bytes per token and route.

The SSD form has kernels of its own (``_ssd``); in float64 it is computed as S6. More than ``MAX_STATE_SIZE`` states are
computed so many at a time: y is linear in them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medmamba_kernels.inputs import ScanInputs
from medmamba_kernels.lowering import from_per_channel, to_per_channel

from . import _launch, _ssd
from ._launch import Call, checked_launch, next_power_of_2, rows, strides

MIN_TRITON = (3, 4)
MAX_STATE_SIZE = 128
# One warp per program; the kernels count on x * y + z as one rounding (Triton 3.10 stops fusing by default).
LAUNCH: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
# The backward needs registers: left alone, ptxas spills a few where the states are small, for warps that never come.
LAUNCH_BACKWARD = LAUNCH if torch.version.hip else {**LAUNCH, "maxnreg": 255}


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install medmamba[triton] or a CUDA build of torch"
    try:
        import triton
    except Exception as error:  # a broken installation fails in many ways, all of which leave the other backends
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_TRITON:
        return f"triton {triton.__version__} is too old; install {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer"
    return None


def unavailable_reason(device: torch.device) -> str | None:
    """Why this backend cannot run on a device, or None."""
    if device.type != "cuda":
        return f"triton kernels need a CUDA or ROCm device, the tensors are on {device.type}"
    return _missing()


def _kernels() -> ModuleType:
    from . import _triton_kernels

    return _triton_kernels


def tile_sizes(state_size: int, is_backward: bool) -> dict[str, int]:
    """Compile-time sizes of a state tile: N states, padded to BN, by BC channels; 16 elements per thread or fewer."""
    padded = next_power_of_2(state_size)
    elements = 256 if is_backward and padded > 16 else 512
    return {"N": state_size, "BN": padded, "BC": min(32, elements // padded)}


def states_shape(
    batch: int, length: int, routes: int, channels: int, state_size: int, device_type: str
) -> tuple[int, ...]:
    """Shape of the saved states: the state at the start of every chunk, (batch, K, M, N, C)."""
    return (batch, routes, -(-length // _launch.chunk_size(length)), state_size, channels)


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class _ChunkStates(NamedTuple):
    """What the chunks of every route hand to one another."""

    entering: Tensor  # (batch, K, M, N, C): the state that enters a chunk
    sums: Tensor  # (batch, K, M, C): sum of dt over a chunk
    last: Tensor | None  # (batch, K, N, C): end of the last chunk from a zero state, if the final state is wanted


class _Call(Call):
    """A call in S6 form, and the launches that forward and backward share."""

    def __init__(self, inputs: ScanInputs) -> None:
        super().__init__(inputs, _launch.chunk_size(inputs.x.shape[1]))
        self.sizes = tile_sizes(self.state_size, is_backward=False)
        self.blocks = -(-self.channels // self.sizes["BC"])
        # Channels last, like the states: neighbouring threads hold neighbouring channels.
        self.A = inputs.A.to(self.dtype).expand(-1, -1, self.state_size).mT.contiguous()

    def chunk_states(
        self, tokens: Tensor, stride: tuple[int, int, int], weights: Tensor, reverse: bool
    ) -> _ChunkStates:
        """What the chunks hand to one another.

        Args:
            tokens: x, or dy for the gradients of the states.
            stride: its strides along batch, routes, L.
            weights: B, or C for the gradients of the states.
        """
        states = self.empty(self.batch, self.routes, self.chunks, self.state_size, self.channels)
        sums = self.empty(self.batch, self.routes, self.chunks, self.channels)
        kernels = _kernels()
        kernels._scan_chunk_kernel[checked_launch(self.batch * self.chunks * self.blocks, self.routes)](
            p_in=tokens,
            p_dt=self.dt,
            p_a=self.A,
            p_weight=weights,
            p_bias=self.dt_bias,
            p_mask=self.mask,
            p_order=self.order,
            p_starts=self.starts,
            p_states=states,
            p_sums=sums,
            **strides("in", "bkl", stride),
            **strides("dt", "blk", self.dt.stride()),
            **strides("weight", "blk", weights.stride()),
            length=self.length,
            routes=self.routes,
            channels=self.channels,
            chunk=self.chunk,
            chunks=self.chunks,
            **self.sizes,
            SOFTPLUS=self.softplus,
            REVERSE=reverse,
            **LAUNCH,
        )
        last = states[:, :, -1].clone() if self.final_state else None
        elements = self.state_size * self.channels
        kernels._scan_carry_kernel[checked_launch(self.batch * self.routes * -(-elements // 32))](
            p_states=states,
            p_sums=sums,
            p_resets=self.resets,
            p_a=self.A,
            routes=self.routes,
            channels=self.channels,
            chunks=self.chunks,
            N=self.state_size,
            BM=16,
            BE=32,
            REVERSE=reverse,
            **LAUNCH,
        )
        return _ChunkStates(states, sums, last)

    def decay(self, sums: Tensor, has_reset: Tensor | None) -> Tensor:
        """exp(A * sum of dt), or 0 over a reset: sums (batch, K, M, C), has_reset (K, M) -> (batch, K, M, N, C)."""
        decay = torch.exp(self.A[:, None] * sums.unsqueeze(-2))
        return decay if has_reset is None else decay * (has_reset == 0)[:, :, None, None]


def forward(inputs: ScanInputs, *, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all routes; see the package docstring of ``backends`` for the interface.

    Returns:
        y in raster order, (batch, L, C) for merge "sum" or (batch, K, L, C) for "none", float32 or float64;
        states (batch, K, M, N, C), or an empty tensor without ``save_states``;
        the final state (batch, K, C, N), or an empty tensor.

    Raises:
        ValueError: more programs than a launch takes.
    """
    if _is_ssd(inputs):
        return _ssd.forward(inputs, save_states=save_states)
    inputs = to_per_channel(inputs)
    if inputs.sizes[-1] > MAX_STATE_SIZE:
        return _forward_by_states(inputs, save_states)
    call = _Call(inputs)
    apart = inputs.merge == "none" or call.one_launch
    y = call.empty(call.batch, call.routes if apart else 1, call.length, call.channels)
    with call.on_device():
        states, final = None, call.empty(0)
        if call.chunks > 1 or inputs.final_state:
            chunks = call.chunk_states(call.x, call.x_stride, call.B, reverse=False)
            states = chunks.entering
            if chunks.last is not None:
                decay = call.decay(chunks.sums[:, :, -1:], None if call.resets is None else call.resets[:, -1:])
                final = (chunks.last + decay[:, :, 0] * states[:, :, -1]).mT
        for first_route, count in call.launches(apart):
            _kernels()._scan_fwd_kernel[checked_launch(call.batch * call.chunks * call.blocks, count)](
                p_x=call.x,
                p_dt=call.dt,
                p_a=call.A,
                p_b=call.B,
                p_c=call.C,
                p_d=call.D,
                p_bias=call.dt_bias,
                p_mask=call.mask,
                p_order=call.order,
                p_starts=call.starts,
                p_states=states,
                p_y=y,
                **strides("x", "bl", call.x.stride()),
                **strides("dt", "blk", call.dt.stride()),
                **strides("b", "blk", call.B.stride()),
                **strides("c", "blk", call.C.stride()),
                **strides("y", "bkl", (y.stride(0), y.stride(1) if apart else 0, y.stride(2))),
                first_route=first_route,
                length=call.length,
                routes=call.routes,
                channels=call.channels,
                chunk=call.chunk,
                chunks=call.chunks,
                **call.sizes,
                SOFTPLUS=call.softplus,
                ACCUMULATE=first_route > 0,
                **LAUNCH,
            )
    if inputs.merge == "sum":
        y = y.squeeze(1) if y.shape[1] == 1 else y.sum(1)
    if not save_states:
        return y, call.empty(0), final
    if states is None:
        shape = states_shape(call.batch, call.length, call.routes, call.channels, call.state_size, call.device.type)
        states = torch.zeros(shape, dtype=call.dtype, device=call.device)
    return y, states, final.contiguous()


def backward(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``inputs.differentiable`` (None where the input is None); ddt in the dtype of dt, the others in
    float32 or float64."""
    if _is_ssd(inputs):
        return _ssd.backward(inputs, dy, dfinal, states)
    return from_per_channel(inputs, _backward(to_per_channel(inputs), dy, dfinal, states))


def _is_ssd(inputs: ScanInputs) -> bool:
    return inputs.heads is not None and inputs.compute_dtype == torch.float32


def _by_states(inputs: ScanInputs) -> list[tuple[slice, ScanInputs]]:
    """An S6 scan in parts of ``MAX_STATE_SIZE`` states, whose outputs add up; D belongs to the first."""
    state_size = inputs.sizes[-1]
    A = inputs.A.expand(-1, -1, state_size)
    parts = [slice(first, first + MAX_STATE_SIZE) for first in range(0, state_size, MAX_STATE_SIZE)]
    return [
        (n, replace(inputs, A=A[..., n], B=inputs.B[..., n], C=inputs.C[..., n], D=None if n.start else inputs.D))
        for n in parts
    ]


def _forward_by_states(inputs: ScanInputs, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, states, finals = zip(*(forward(part, save_states=save_states) for _, part in _by_states(inputs)), strict=True)
    return _sum(y), torch.cat(states, 3) if save_states else states[0], torch.cat(finals, -1)


def _backward_by_states(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> _Gradients:
    gradients = [
        _backward(part, dy, None if dfinal is None else dfinal[..., n], states[:, :, :, n].contiguous())
        for n, part in _by_states(inputs)
    ]
    dx, ddt, dA, dB, dC, dD, dbias = zip(*gradients, strict=True)
    dbias_sum = None if inputs.dt_bias is None else _sum(dbias)
    return _sum(dx), _sum(ddt), torch.cat(dA, -1), torch.cat(dB, -1), torch.cat(dC, -1), dD[0], dbias_sum


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, from the first to the last."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _later_states(call: _Call, dy: Tensor, dy_stride: tuple[int, int, int], dfinal: Tensor | None) -> Tensor:
    """dL/dh at the end of every chunk as seen from what comes after it, (batch, K, M, N, C)."""
    if call.chunks == 1:
        if dfinal is not None:
            return dfinal.mT.unsqueeze(2).contiguous()
        shape = states_shape(call.batch, call.length, call.routes, call.channels, call.state_size, call.device.type)
        return torch.zeros(shape, dtype=call.dtype, device=call.device)
    later, sums, _ = call.chunk_states(dy, dy_stride, call.C, reverse=True)
    if dfinal is None:
        return later
    # The decay from the end of a chunk to the end of the route.
    after = _sum_of_later(sums, axis=2)
    resets = None if call.resets is None else _sum_of_later(call.resets.long(), axis=1)
    return later + call.decay(after, resets) * dfinal.mT.unsqueeze(2)


def _sum_of_later(values: Tensor, axis: int) -> Tensor:
    """Sum of everything after each index of an axis."""
    shifted = torch.zeros_like(values)
    shifted.narrow(axis, 0, values.shape[axis] - 1).copy_(values.narrow(axis, 1, values.shape[axis] - 1))
    return shifted.flip(axis).cumsum(axis).flip(axis)


def _backward(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> _Gradients:
    """Of an S6 scan: gradients of x, dt, A (K, c, N), B, C, D, dt_bias."""
    if inputs.sizes[-1] > MAX_STATE_SIZE:
        return _backward_by_states(inputs, dy, dfinal, states)
    call = _Call(inputs)
    sizes = tile_sizes(call.state_size, is_backward=True)
    dy = rows(dy)
    dy_stride = call.gradient_stride(dy)
    batch, length, channels, routes, state_size = call.batch, call.length, call.channels, call.routes, call.state_size
    items, copies = batch * call.chunks, routes if call.one_launch else 1
    parts = min(items, max(1, _launch.PROGRAMS // copies))
    groups = max(1, min(-(-channels // sizes["BC"]), _launch.PROGRAMS // (parts * copies)))
    dx = call.empty(batch, copies, length, channels)
    ddt = call.empty(*inputs.dt.shape, dtype=inputs.dt.dtype)
    dB, dC = (call.empty(groups, batch, length, routes, state_size) for _ in range(2))
    scratch = call.empty(parts * groups * copies, call.chunk // 4, sizes["BN"], sizes["BC"])
    partial_dA = call.empty(parts, copies, state_size, channels)
    partial_dD, partial_bias = (
        None if t is None else call.empty(parts, copies, channels) for t in (inputs.D, inputs.dt_bias)
    )
    dA = call.empty(routes, state_size, channels)
    dD, dbias = (None if t is None else call.empty(routes, channels) for t in (inputs.D, inputs.dt_bias))
    with call.on_device():
        later = _later_states(call, dy, dy_stride, dfinal)
        for first_route, count in call.launches():
            _kernels()._scan_bwd_kernel[checked_launch(parts, groups, count)](
                p_dy=dy,
                p_x=call.x,
                p_dt=call.dt,
                p_a=call.A,
                p_b=call.B,
                p_c=call.C,
                p_d=call.D,
                p_bias=call.dt_bias,
                p_mask=call.mask,
                p_order=call.order,
                p_starts=call.starts,
                p_states=states,
                p_later=later,
                p_scratch=scratch,
                p_dx=dx,
                p_ddt=ddt,
                p_da=partial_dA,
                p_db=dB,
                p_dc=dC,
                p_dd=partial_dD,
                p_dbias=partial_bias,
                **strides("dy", "bkl", dy_stride),
                **strides("x", "bl", call.x.stride()),
                **strides("dt", "blk", call.dt.stride()),
                **strides("b", "blk", call.B.stride()),
                **strides("c", "blk", call.C.stride()),
                **strides("dx", "bkl", (dx.stride(0), dx.stride(1) if call.one_launch else 0, dx.stride(2))),
                first_route=first_route,
                batch=batch,
                length=length,
                routes=routes,
                channels=channels,
                chunk=call.chunk,
                chunks=call.chunks,
                **sizes,
                SOFTPLUS=call.softplus,
                ACCUMULATE=first_route > 0,
                **LAUNCH_BACKWARD,
            )
            part = slice(first_route, first_route + count)
            dA[part] = partial_dA.sum(0)
            if dD is not None and partial_dD is not None:
                dD[part] = partial_dD.sum(0)
            if dbias is not None and partial_bias is not None:
                dbias[part] = partial_bias.sum(0)
    dB, dC = (t.squeeze(0) if groups == 1 else t.sum(0) for t in (dB, dC))
    return dx.squeeze(1) if copies == 1 else dx.sum(1), ddt, dA.mT, dB, dC, dD, dbias
