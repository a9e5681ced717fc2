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
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medmamba_kernels.inputs import ScanInputs
from medmamba_kernels.lowering import from_per_channel, to_per_channel

MIN_TRITON = (3, 4)
MAX_STATE_SIZE = 128
# Programs of a backward launch that fill a GPU (132 multiprocessors of an H200, eight programs each, rounded).
PROGRAMS = 1024
# One warp per program; the kernels count on x * y + z as one rounding (Triton 3.10 stops fusing by default).
LAUNCH: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
# The backward needs registers: left alone, ptxas spills a few where the states are small, for warps that never come.
LAUNCH_BACKWARD = LAUNCH if torch.version.hip else {**LAUNCH, "maxnreg": 255}
# Outputs of all routes of a volume up to this size stay in the second-level cache of a data-centre GPU.
COPIES_BYTES = 16 * 2**20


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


def _chunk_size(length: int) -> int:
    """Tokens of a chunk, a multiple of 4: long sequences have enough chunks and save memory and carries."""
    return 64 if length <= 2**16 else 128


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tile_sizes(state_size: int, is_backward: bool) -> dict[str, int]:
    """Compile-time sizes of a state tile: N states, padded to BN, by BC channels; 16 elements per thread or fewer."""
    padded = _next_power_of_2(state_size)
    elements = 256 if is_backward and padded > 16 else 512
    return {"N": state_size, "BN": padded, "BC": min(32, elements // padded)}


def states_shape(
    batch: int, length: int, routes: int, channels: int, state_size: int, device_type: str
) -> tuple[int, ...]:
    """Shape of the saved states: the state at the start of every chunk, (batch, K, M, N, C)."""
    return (batch, routes, -(-length // _chunk_size(length)), state_size, channels)


def _rows(tensor: Tensor) -> Tensor:
    """With a contiguous last axis; the other axes keep their strides (no copy)."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


@lru_cache(maxsize=16)
def _device_table(
    order: Tensor, starts: Tensor | None, chunk: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """On the device: order, starts, and (K, M) which chunks hold a start."""
    if starts is None:
        return order.to(device), None, None
    padding = -starts.shape[1] % chunk
    resets = torch.nn.functional.pad(starts, (0, padding)).unflatten(1, (-1, chunk)).any(-1)
    return order.to(device), starts.to(device, torch.int8), resets.to(device, torch.int8)


class _ChunkStates(NamedTuple):
    """What the chunks of every route hand to one another."""

    entering: Tensor  # (batch, K, M, N, C): the state that enters a chunk
    sums: Tensor  # (batch, K, M, C): sum of dt over a chunk
    last: Tensor | None  # (batch, K, N, C): end of the last chunk from a zero state, if the final state is wanted


class _Call:
    """The arguments of a call as the kernels take them, and their launches."""

    def __init__(self, inputs: ScanInputs) -> None:
        self.batch, self.length, self.channels, self.routes, self.state_size = inputs.sizes
        if self.state_size > MAX_STATE_SIZE:
            raise ValueError(f'state size {self.state_size} is above {MAX_STATE_SIZE}; use backend="torch"')
        self.dtype = inputs.compute_dtype
        self.device = inputs.x.device
        self.chunk = _chunk_size(self.length)
        self.chunks = -(-self.length // self.chunk)
        self.sizes = tile_sizes(self.state_size, is_backward=False)
        self.blocks = -(-self.channels // self.sizes["BC"])
        self.softplus = inputs.dt_softplus
        self.final_state = inputs.final_state
        self.x, self.dt, self.B, self.C = (_rows(t) for t in (inputs.x, inputs.dt, inputs.B, inputs.C))
        # Channels last, like the states: neighbouring threads hold neighbouring channels.
        self.A = inputs.A.to(self.dtype).expand(-1, -1, self.state_size).mT.contiguous()
        self.D = None if inputs.D is None else inputs.D.to(self.dtype).contiguous()
        self.dt_bias = None if inputs.dt_bias is None else inputs.dt_bias.to(self.dtype).contiguous()
        self.mask = None if inputs.dt_mask is None else inputs.dt_mask.contiguous().view(torch.uint8)
        self.order, self.starts, self.resets = _device_table(inputs.order, inputs.starts, self.chunk, self.device)
        copies = self.batch * self.routes * self.length * self.channels * self.dtype.itemsize
        self.one_launch = self.routes == 1 or copies <= COPIES_BYTES

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def chunk_states(self, tokens: Tensor, stride: tuple[int, ...], weights: Tensor, reverse: bool) -> _ChunkStates:
        """What the chunks hand to one another.

        Args:
            tokens: x, or dy for the gradients of the states.
            stride: its strides along batch, routes, L.
            weights: B, or C for the gradients of the states.
        """
        states = self.empty(self.batch, self.routes, self.chunks, self.state_size, self.channels)
        sums = self.empty(self.batch, self.routes, self.chunks, self.channels)
        kernels = _kernels()
        kernels._scan_chunk_kernel[(self.chunks * self.blocks, self.batch * self.routes)](
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
            s_in_b=stride[0],
            s_in_k=stride[1],
            s_in_l=stride[2],
            s_dt_b=self.dt.stride(0),
            s_dt_l=self.dt.stride(1),
            s_dt_k=self.dt.stride(2),
            s_weight_b=weights.stride(0),
            s_weight_l=weights.stride(1),
            s_weight_k=weights.stride(2),
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
        kernels._scan_carry_kernel[(-(-elements // 32), self.batch * self.routes)](
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

    def launches(self) -> list[tuple[int, int]]:
        """First route and number of routes of every launch whose routes share an output."""
        return [(0, self.routes)] if self.one_launch else [(k, 1) for k in range(self.routes)]


def forward(inputs: ScanInputs, *, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all routes; see the package docstring of ``backends`` for the interface.

    Returns:
        y in raster order, (batch, L, C) for merge "sum" or (batch, K, L, C) for "none", float32 or float64;
        states (batch, K, M, N, C), or an empty tensor without ``save_states``;
        the final state (batch, K, C, N), or an empty tensor.

    Raises:
        ValueError: a state size above ``MAX_STATE_SIZE``.
    """
    inputs = to_per_channel(inputs)
    call = _Call(inputs)
    apart = inputs.merge == "none" or call.one_launch
    launches = [(0, call.routes)] if apart else call.launches()
    y = call.empty(call.batch, call.routes if apart else 1, call.length, call.channels)
    with call.on_device():
        states, final = None, call.empty(0)
        if call.chunks > 1 or inputs.final_state:
            chunks = call.chunk_states(call.x, (call.x.stride(0), 0, call.x.stride(1)), call.B, reverse=False)
            states = chunks.entering
            if chunks.last is not None:
                decay = call.decay(chunks.sums[:, :, -1:], None if call.resets is None else call.resets[:, -1:])
                final = (chunks.last + decay[:, :, 0] * states[:, :, -1]).mT
        for first_route, count in launches:
            _kernels()._scan_fwd_kernel[(call.chunks * call.blocks, call.batch, count)](
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
                s_x_b=call.x.stride(0),
                s_x_l=call.x.stride(1),
                s_dt_b=call.dt.stride(0),
                s_dt_l=call.dt.stride(1),
                s_dt_k=call.dt.stride(2),
                s_b_b=call.B.stride(0),
                s_b_l=call.B.stride(1),
                s_b_k=call.B.stride(2),
                s_c_b=call.C.stride(0),
                s_c_l=call.C.stride(1),
                s_c_k=call.C.stride(2),
                s_y_b=y.stride(0),
                s_y_k=y.stride(1) if apart else 0,
                s_y_l=y.stride(2),
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
    return from_per_channel(inputs, _backward(to_per_channel(inputs), dy, dfinal, states))


def _later_states(call: _Call, dy: Tensor, dy_stride: tuple[int, ...], dfinal: Tensor | None) -> Tensor:
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


def _backward(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> tuple[Tensor | None, ...]:
    call = _Call(inputs)
    sizes = tile_sizes(call.state_size, is_backward=True)
    dy = _rows(dy)
    dy_stride = (dy.stride(0), 0, dy.stride(1)) if inputs.merge == "sum" else dy.stride()[:3]
    batch, length, channels, routes, state_size = call.batch, call.length, call.channels, call.routes, call.state_size
    launches = call.launches()
    items, copies = batch * call.chunks, routes if call.one_launch else 1
    parts = min(items, max(1, PROGRAMS // copies))
    groups = max(1, min(-(-channels // sizes["BC"]), PROGRAMS // (parts * copies)))
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
        for first_route, count in launches:
            _kernels()._scan_bwd_kernel[(parts, groups, count)](
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
                s_dy_b=dy_stride[0],
                s_dy_k=dy_stride[1],
                s_dy_l=dy_stride[2],
                s_x_b=call.x.stride(0),
                s_x_l=call.x.stride(1),
                s_dt_b=call.dt.stride(0),
                s_dt_l=call.dt.stride(1),
                s_dt_k=call.dt.stride(2),
                s_b_b=call.B.stride(0),
                s_b_l=call.B.stride(1),
                s_b_k=call.B.stride(2),
                s_c_b=call.C.stride(0),
                s_c_l=call.C.stride(1),
                s_c_k=call.C.stride(2),
                s_dx_b=dx.stride(0),
                s_dx_k=dx.stride(1) if call.one_launch else 0,
                s_dx_l=dx.stride(2),
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
