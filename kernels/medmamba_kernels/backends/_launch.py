"""What the launches of all Triton kernels share: sizes, tables on the device, tensors as the kernels take them.

``PROGRAMS``, ``COPIES_BYTES`` and ``chunk_size`` fix in which order numbers are added. None depends on the GPU, so that
equal calls give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from medmamba_kernels.inputs import ScanInputs

# Programs of a launch that fill a GPU (132 multiprocessors of an H200, eight programs each, rounded).
PROGRAMS = 1024
# Outputs of all routes of a volume up to this size stay in the second-level cache of a data-centre GPU.
COPIES_BYTES = 16 * 2**20
# Largest first axis and other axes of a grid, on NVIDIA GPUs; those of AMD take more.
_MAX_GRID = (2**31 - 1, 65535)


def chunk_size(length: int) -> int:
    """Tokens between two saved states, a multiple of 64: a long sequence has chunks enough, and saves memory."""
    return 64 if length <= 2**16 else 128


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def checked_launch(*axes: int) -> tuple[int, ...]:
    """The axes of a grid of programs; ValueError where a GPU does not take them."""
    if axes[0] > _MAX_GRID[0] or any(axis > _MAX_GRID[1] for axis in axes[1:]):
        raise ValueError(
            f"the scan needs a grid of {axes} programs, a GPU takes {_MAX_GRID[0]} and then {_MAX_GRID[1]}; "
            "give it fewer samples or routes at a time"
        )
    return axes


def strides(name: str, axes: str, values: Sequence[int]) -> dict[str, int]:
    """Keyword arguments s_NAME_AXIS of a kernel, for the first axes of a tensor."""
    return {f"s_{name}_{axis}": value for axis, value in zip(axes, values, strict=False)}


def rows(tensor: Tensor) -> Tensor:
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


class Call:
    """The arguments of a call as the kernels take them.

    Attributes:
        chunk: tokens of a chunk.
        x_stride: strides of x along batch, routes and L, for kernels that may also read a tensor with routes.
        one_launch: all routes write copies of the output, which are added; else every route is a launch of its own
            that adds to the output of the launches before.
    """

    def __init__(self, inputs: ScanInputs, chunk: int) -> None:
        self.batch, self.length, self.channels, self.routes, self.state_size = inputs.sizes
        self.dtype = inputs.compute_dtype
        self.device = inputs.x.device
        self.chunk = chunk
        self.chunks = -(-self.length // chunk)
        self.softplus = inputs.dt_softplus
        self.final_state = inputs.final_state
        self.merge = inputs.merge
        self.x, self.dt, self.B, self.C = (rows(t) for t in (inputs.x, inputs.dt, inputs.B, inputs.C))
        self.x_stride = (self.x.stride(0), 0, self.x.stride(1))
        self.D = None if inputs.D is None else inputs.D.to(self.dtype).contiguous()
        self.dt_bias = None if inputs.dt_bias is None else inputs.dt_bias.to(self.dtype).contiguous()
        self.mask = None if inputs.dt_mask is None else inputs.dt_mask.contiguous().view(torch.uint8)
        self.order, self.starts, self.resets = _device_table(inputs.order, inputs.starts, chunk, self.device)
        copies = self.batch * self.routes * self.length * self.channels * self.dtype.itemsize
        self.one_launch = self.routes == 1 or copies <= COPIES_BYTES

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor on the device, in the compute dtype unless another is named."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def launches(self, apart: bool = False) -> list[tuple[int, int]]:
        """First route and number of routes of every launch; ``apart``: routes do not share an output."""
        return [(0, self.routes)] if apart or self.one_launch else [(k, 1) for k in range(self.routes)]

    def gradient_stride(self, dy: Tensor) -> tuple[int, int, int]:
        """Strides of dy along batch, routes and L."""
        if self.merge == "sum":
            return dy.stride(0), 0, dy.stride(1)
        return dy.stride(0), dy.stride(1), dy.stride(2)
