"""The SSD form on GPUs: launches of the kernels in ``_triton_ssd``.

Of the two ways to compute a scan with one rate per head this is the one by matrix products. float64 goes the other
way, through :mod:`medmamba_kernels.lowering`: tensor cores have nothing to give there.

Peak memory beside inputs and results, in bytes, for the sizes B L K C N, H heads and chunks of Q = 64 tokens:

    forward     4 B K C N L / Q                          states; if they are saved, every one, or every second
                12 B K H L                               step sizes and sums of log decays
                4 B K L C where all routes write copies (at most ``COPIES_BYTES``)
    backward    4 B K C N L / Q                          gradients of the states; twice if every second was saved
                (16 + 8 ceil(N / 32)) B K H L            step sizes, sums, and their gradients (N / 16 for float32)
                4 B K C L / Q                            partial sums of dD
                8 G B L K N                              dB, dC of groups of heads: G = 1 or B L K G <= Q ``PROGRAMS``
                4 B K L C where all routes write copies
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medmamba_kernels.inputs import ScanInputs
from medmamba_kernels.lowering import fold_projection, project_dt

from . import _launch
from ._launch import Call, checked_launch, next_power_of_2, rows, strides

# Tokens of a chunk; divides ``_launch.chunk_size``.
CHUNK = 64
LAUNCH: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": True}
LAUNCH_STEPS = {**LAUNCH, "num_warps": 4}
LAUNCH_CARRY = {**LAUNCH, "num_warps": 1}


def _kernels() -> ModuleType:
    from . import _triton_ssd

    return _triton_ssd


def tile_sizes(state_size: int, width: int, is_bfloat16: bool) -> dict[str, int]:
    """Compile-time sizes of a tile: BN of N states by BP of the P channels of a head.

    Products of float32 numbers hold three times the operands in registers, and spill in larger tiles.
    """
    largest = 32 if is_bfloat16 else 16
    states, channels = (max(16, min(largest, next_power_of_2(n))) for n in (state_size, width))
    return {"N": state_size, "P": width, "BN": states, "BP": channels}


def product_options(is_hip: bool) -> dict[str, Any]:
    """How kernels with products of matrices are launched: by 256 threads, which is 4 warps on AMD.

    Products of float32 numbers need three products of tf32 numbers on NVIDIA. There ptxas may also stop at 128
    registers and spill, for a second program on the multiprocessor, if it is not told that it may have all.
    """
    if is_hip:
        return {**LAUNCH, "PRECISION": "ieee", "num_warps": 4}
    return {**LAUNCH, "PRECISION": "tf32x3", "num_warps": 8, "maxnreg": 255}


class _Steps(NamedTuple):
    """Of every token in the order of its route, (batch, K, M, H, CHUNK) float32."""

    dt: Tensor
    high: Tensor  # sum of log2 decays within the chunk ...
    low: Tensor  # ... and its rounding
    slope: Tensor | None  # d dt / d raw, for the backward
    decays: Tensor  # (batch, K, M, H): decay over a chunk


class _Call(Call):
    """A call in SSD form, and its launches."""

    def __init__(self, inputs: ScanInputs, is_backward: bool) -> None:
        super().__init__(inputs, CHUNK)
        assert inputs.heads is not None
        self.heads = inputs.heads
        self.width = self.channels // self.heads
        self.A = inputs.A.to(self.dtype).contiguous()
        is_bfloat16 = all(t.dtype == torch.bfloat16 for t in (self.x, self.B, self.C))
        self.tile = tile_sizes(self.state_size, self.width, is_bfloat16)
        self.options = {**self.tile, "Q": CHUNK, **product_options(torch.version.hip is not None)}
        self.steps = self._steps(is_backward)

    def groups(self, routes: int) -> int:
        """Programs that share the heads of a chunk: as many as fill a GPU."""
        return max(1, min(self.heads, _launch.PROGRAMS // (self.batch * routes * self.chunks)))

    def _steps(self, with_slope: bool) -> _Steps:
        shape = (self.batch, self.routes, self.chunks, self.heads)
        dt, high, low = (self.empty(*shape, CHUNK) for _ in range(3))
        steps = _Steps(dt, high, low, self.empty(*shape, CHUNK) if with_slope else None, self.empty(*shape))
        block = min(16, next_power_of_2(self.heads))
        programs = self.batch * self.routes * self.chunks * -(-self.heads // block)
        with self.on_device():
            _kernels()._ssd_steps_kernel[checked_launch(programs)](
                p_raw=self.dt,
                p_a=self.A,
                p_bias=self.dt_bias,
                p_mask=self.mask,
                p_order=self.order,
                p_starts=self.starts,
                p_dt=steps.dt,
                p_high=steps.high,
                p_low=steps.low,
                p_slope=steps.slope,
                p_decays=steps.decays,
                **strides("raw", "blk", self.dt.stride()),
                length=self.length,
                routes=self.routes,
                heads=self.heads,
                chunks=self.chunks,
                Q=CHUNK,
                BH=block,
                SOFTPLUS=self.softplus,
                **LAUNCH_STEPS,
            )
        return steps

    def states(
        self,
        tokens: Tensor,
        stride: tuple[int, int, int],
        weights: Tensor,
        reverse: bool,
        first: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """The state that enters every chunk (batch, K, M, N, C).

        Args:
            tokens: x, or dy for the gradients of the states, from the last chunk to the first.
            stride: its strides along batch, routes, L.
            weights: B, or C for the gradients of the states.
            first: (batch, K, N, C), what enters the first of them, or None.
            last: (batch, K, N, C), where to write what the last of them hands on, or None.
        """
        states = self.empty(self.batch, self.routes, self.chunks, self.state_size, self.channels)
        groups = self.groups(self.routes)
        elements = self.state_size * self.channels
        with self.on_device():
            _kernels()._ssd_chunk_kernel[checked_launch(self.batch * self.routes * self.chunks * groups)](
                p_in=tokens,
                p_weight=weights,
                p_dt=self.steps.dt,
                p_high=self.steps.high,
                p_low=self.steps.low,
                p_mask=self.mask,
                p_order=self.order,
                p_states=states,
                **strides("in", "bkl", stride),
                **strides("weight", "blk", weights.stride()),
                length=self.length,
                routes=self.routes,
                heads=self.heads,
                chunks=self.chunks,
                groups=groups,
                REVERSE=reverse,
                **self.options,
            )
            _kernels()._ssd_carry_kernel[checked_launch(self.batch * self.routes * -(-elements // 32))](
                p_states=states,
                p_decays=self.steps.decays,
                p_first=first,
                p_last=last,
                heads=self.heads,
                chunks=self.chunks,
                N=self.state_size,
                P=self.width,
                BM=16,
                BE=32,
                REVERSE=reverse,
                **LAUNCH_CARRY,
            )
        return states

    def outputs(
        self,
        tokens: Tensor,
        stride: tuple[int, int, int],
        weights: tuple[Tensor, Tensor],
        states: Tensor | None,
        apart: bool,
        reverse: bool,
    ) -> Tensor:
        """y, or dx in reverse: (batch, L, C), or (batch, K, L, C) where ``apart``.

        Args:
            tokens: x, or dy in reverse.
            stride: its strides along batch, routes, L.
            weights: those of what is read and of what is written: B and C, or C and B in reverse.
            states: (batch, K, M, N, C) that enter the chunks, or their gradients; None for zeros.
        """
        copies = apart or self.one_launch
        y = self.empty(self.batch, self.routes if copies else 1, self.length, self.channels)
        with self.on_device():
            for first_route, count in self.launches(apart):
                groups = self.groups(count)
                _kernels()._ssd_output_kernel[checked_launch(self.batch * self.chunks * groups, count)](
                    p_in=tokens,
                    p_in_weight=weights[0],
                    p_out_weight=weights[1],
                    p_d=self.D,
                    p_dt=self.steps.dt,
                    p_high=self.steps.high,
                    p_low=self.steps.low,
                    p_mask=self.mask,
                    p_order=self.order,
                    p_states=states,
                    p_out=y,
                    **strides("in", "bkl", stride),
                    **strides("in_weight", "blk", weights[0].stride()),
                    **strides("out_weight", "blk", weights[1].stride()),
                    **strides("out", "bkl", (y.stride(0), y.stride(1) if copies else 0, y.stride(2))),
                    first_route=first_route,
                    length=self.length,
                    routes=self.routes,
                    heads=self.heads,
                    chunks=self.chunks,
                    groups=groups,
                    REVERSE=reverse,
                    ACCUMULATE=first_route > 0,
                    **self.options,
                )
        if apart:
            return y
        return y.squeeze(1) if y.shape[1] == 1 else y.sum(1)


def forward(inputs: ScanInputs, *, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As ``gpu.forward``, for inputs in SSD form that are not float64."""
    call = _Call(project_dt(inputs), is_backward=False)
    states = None
    final = call.empty(call.batch, call.routes, call.state_size, call.channels) if inputs.final_state else None
    if call.chunks > 1 or inputs.final_state:
        states = call.states(call.x, call.x_stride, call.B, reverse=False, last=final)
    y = call.outputs(call.x, call.x_stride, (call.B, call.C), states, inputs.merge == "none", reverse=False)
    saved = call.empty(0)
    if save_states and states is None:
        saved = call.empty(call.batch, call.routes, 1, call.state_size, call.channels).zero_()
    elif save_states and states is not None:
        saved = states[:, :, :: _launch.chunk_size(call.length) // CHUNK].contiguous()
    return y, saved, call.empty(0) if final is None else final.mT.contiguous()


def backward(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> tuple[Tensor | None, ...]:
    """As ``gpu.backward``, for inputs in SSD form that are not float64."""
    projected = project_dt(inputs)
    call = _Call(projected, is_backward=True)
    dy = rows(dy)
    dy_stride = call.gradient_stride(dy)
    if states.shape[2] < call.chunks:
        # Only every second state was saved.
        states = call.states(call.x, call.x_stride, call.B, reverse=False)
    later = None if dfinal is None else dfinal.mT.contiguous()
    if call.chunks > 1:
        later = call.states(dy, dy_stride, call.C, reverse=True, first=later)
    later = torch.zeros_like(states) if later is None else later.view(states.shape)
    dx = call.outputs(dy, dy_stride, (call.C, call.B), later, apart=False, reverse=True)
    return dx, *fold_projection(inputs, *_other_gradients(call, projected.dt.dtype, dy, dy_stride, states, later))


def _other_gradients(
    call: _Call, dt_dtype: torch.dtype, dy: Tensor, dy_stride: tuple[int, int, int], states: Tensor, later: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """ddt (b, L, K, H), and dA, dB, dC, dD, ddt_bias."""
    batch, length, routes, chunks, heads = call.batch, call.length, call.routes, call.chunks, call.heads
    groups = call.groups(routes)
    blocks = -(-call.state_size // call.tile["BN"])
    programs = batch * routes * chunks * groups
    dB, dC = (call.empty(groups, batch, length, routes, call.state_size) for _ in range(2))
    entering, leaving = (call.empty(blocks, batch, routes, chunks, heads, CHUNK) for _ in range(2))
    through = call.empty(blocks, batch, routes, chunks, heads)
    ddt = call.empty(batch, length, routes, heads, dtype=dt_dtype)
    dA = call.empty(batch, routes, chunks, heads)
    dD = None if call.D is None else call.empty(batch, routes, chunks, call.channels)
    dbias = None if call.dt_bias is None else call.empty(batch, routes, chunks, heads)
    shared = {
        "p_dy": dy,
        "p_x": call.x,
        "p_b": call.B,
        "p_c": call.C,
        "p_dt": call.steps.dt,
        "p_high": call.steps.high,
        "p_low": call.steps.low,
        "p_mask": call.mask,
        "p_order": call.order,
        "p_db": dB,
        "p_dc": dC,
        **strides("dy", "bkl", dy_stride),
        **strides("x", "bl", call.x.stride()),
        **strides("b", "blk", call.B.stride()),
        **strides("c", "blk", call.C.stride()),
        "batch": batch,
        "length": length,
        "routes": routes,
        "heads": heads,
        "chunks": chunks,
        "groups": groups,
        **call.options,
    }
    with call.on_device():
        _kernels()._ssd_bwd_states_kernel[checked_launch(programs, blocks)](
            **shared,
            p_decays=call.steps.decays,
            p_states=states,
            p_later=later,
            p_entering=entering,
            p_leaving=leaving,
            p_through=through,
        )
        entering, leaving, through = (t.squeeze(0) if blocks == 1 else t.sum(0) for t in (entering, leaving, through))
        _kernels()._ssd_bwd_pairs_kernel[checked_launch(programs)](
            **shared,
            p_a=call.A,
            p_slope=call.steps.slope,
            p_entering=entering,
            p_leaving=leaving,
            p_through=through,
            p_ddt=ddt,
            p_da=dA,
            p_dd=dD,
            p_dbias=dbias,
        )
    dB, dC = (t.squeeze(0) if groups == 1 else t.sum(0) for t in (dB, dC))
    others = [None if t is None else t.sum((0, 2)) for t in (dD, dbias)]
    return ddt, (dA.sum((0, 2)), dB, dC, *others)
