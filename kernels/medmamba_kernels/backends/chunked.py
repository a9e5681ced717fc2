"""Chunked scan in plain PyTorch: any device, no compiler, memory bounded.

The sequence of a route is cut into M chunks of T tokens. All chunks advance together, one token per step, so a
step works on a (batch, M, C, N) state and a Python loop over T steps replaces one over L tokens:

1. every chunk from a zero state: its end state, and its total decay exp(A * sum of dt) (in log space, so that
   nothing is ever divided by a decay);
2. M short steps carry the state from chunk to chunk: the state every chunk starts with;
3. every chunk again from its true start, now writing y.

The backward does the same from the other end, and recomputes the states inside a chunk from the saved chunk
starts. Routes are treated one after the other: only one route's sequence exists at a time. Computed in float32,
or float64 for float64 input.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba_kernels.inputs import ScanInputs, bad_step_error
from medmamba_kernels.lowering import from_per_channel, to_per_channel

# State elements that one step works on: on a CPU they should stay in the second-level cache, a GPU wants work.
_STEP_ELEMENTS = {"cpu": 2**17, "cuda": 2**22}
# State elements that the backward keeps at a time (twice: states and decays).
_BACKWARD_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


def unavailable_reason(device: torch.device) -> str | None:
    """Always None: this backend runs wherever torch does."""
    return None


def _chunk_size(batch: int, length: int, channels: int, state_size: int, device_type: str) -> int:
    budget = _STEP_ELEMENTS.get(device_type, _STEP_ELEMENTS["cuda"])
    return max(1, min(length, max(8, -(-batch * length * channels * state_size // budget))))


def states_shape(
    batch: int, length: int, routes: int, channels: int, state_size: int, device_type: str
) -> tuple[int, ...]:
    """Shape of the saved states: the state at the start of every chunk, (K, batch, M, C, N)."""
    chunk = _chunk_size(batch, length, channels, state_size, device_type)
    return (routes, batch, -(-length // chunk), channels, state_size)


class _RouteView:
    """The inputs of one route, gathered into chunks: token tensors become (batch, T, M, ...)."""

    def __init__(self, inputs: ScanInputs, route: int, chunk: int):
        x, device = inputs.x, inputs.x.device
        batch, length, _, _, _ = inputs.sizes
        self.A = inputs.A[route]
        self.D = None if inputs.D is None else inputs.D[route]
        self.chunk, self.chunks = chunk, -(-length // chunk)
        padding = self.chunk * self.chunks - length
        self.token = self._by_step(F.pad(inputs.order[route].long(), (0, padding))).reshape(-1).to(device)
        real = torch.arange(self.chunk * self.chunks) < length
        self.real = self._by_step(real).reshape(-1).to(device)
        active = self.real.expand(batch, -1)
        if inputs.dt_mask is not None:
            active = inputs.dt_mask[:, self.token] & self.real
        # Padding is transparent by itself (dt = 0, x = 0); a mask must also hide what masked tokens hold.
        self.active = active.view(batch, chunk, self.chunks, 1)
        self.all_active = padding == 0 and inputs.dt_mask is None
        self.x = self._hide(self._gather(x))
        raw = self._gather(inputs.dt[:, :, route])
        self.raw = self._hide(raw if inputs.dt_bias is None else raw + inputs.dt_bias[route])
        self.dt = self._hide(F.softplus(self.raw) if inputs.dt_softplus else self.raw)
        self.B = self._hide(self._gather(inputs.B[:, :, route]))
        self.C = self._hide(self._gather(inputs.C[:, :, route]))
        self.keep = None
        if inputs.starts is not None:
            starts = self._by_step(F.pad(inputs.starts[route], (0, padding)))
            self.keep = (~starts).to(device=device, dtype=x.dtype).view(chunk, self.chunks, 1, 1)

    def _by_step(self, sequence: Tensor) -> Tensor:
        """(M * T,) along the route -> (T, M): step within the chunk first."""
        return sequence.view(self.chunks, self.chunk).T

    def _gather(self, tokens: Tensor) -> Tensor:
        batch, _, width = tokens.shape
        return tokens[:, self.token].view(batch, self.chunk, self.chunks, width)

    def _hide(self, tokens: Tensor) -> Tensor:
        if self.all_active:
            return tokens
        return torch.where(self.active, tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device))

    def gather_gradient(self, dy: Tensor) -> Tensor:
        return self._hide(self._gather(dy))

    def scatter(self, chunked: Tensor, into: Tensor, add: bool = False) -> None:
        """Write (batch, T, M, width) back to the raster order of ``into`` (batch, L, width)."""
        values = chunked.reshape(chunked.shape[0], -1, chunked.shape[-1])[:, self.real]
        token = self.token[self.real]
        # Every token occurs once per route, so this addition is exact and deterministic.
        into[:, token] = into[:, token] + values if add else values

    def zero_state(self) -> Tensor:
        """(batch, M, C, N) zeros."""
        return self.x.new_zeros(self.x.shape[0], self.chunks, self.x.shape[-1], self.B.shape[-1])

    def decay(self, step: int, part: slice = slice(None)) -> Tensor:
        decay = torch.exp(self.dt[:, step, part, :, None] * self.A)
        return decay if self.keep is None else decay * self.keep[step, part]

    def drive(self, step: int, part: slice = slice(None)) -> Tensor:
        return (self.dt[:, step, part] * self.x[:, step, part]).unsqueeze(-1) * self.B[:, step, part, None, :]

    def chunk_decay(self) -> Tensor:
        """Decay over a whole chunk, (batch, M, C, N)."""
        decay = torch.exp(self.dt.sum(1).unsqueeze(-1) * self.A)
        return decay if self.keep is None else decay * self.keep.prod(0)


def _carry(local: Tensor, decay: Tensor, reverse: bool = False, last: Tensor | None = None) -> Tensor:
    """States entering every chunk, from the chunks' local end states, both (batch, M, C, N).

    ``reverse`` goes from the last chunk to the first; the last is then entered by ``last`` (batch, C, N), or by zero.
    """
    entering = torch.zeros_like(local)
    if last is not None:
        entering[:, -1] = last
    chunks = range(local.shape[1])
    for previous, m in pairwise(reversed(chunks) if reverse else chunks):
        entering[:, m] = decay[:, previous] * entering[:, previous] + local[:, previous]
    return entering


def _chunk_starts(view: _RouteView) -> Tensor:
    h = view.zero_state()
    if view.chunks == 1:
        return h
    for step in range(view.chunk):
        h.mul_(view.decay(step)).add_(view.drive(step))
    return _carry(h, view.chunk_decay())


def forward(inputs: ScanInputs, *, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all routes; see the package docstring of ``backends`` for the interface."""
    inputs = to_per_channel(inputs.in_compute_dtype())
    batch, length, channels, routes, state_size = inputs.sizes
    device_type = inputs.x.device.type
    chunk = _chunk_size(batch, length, channels, state_size, device_type)
    y = inputs.x.new_zeros(inputs.output_shape())
    shape = states_shape(batch, length, routes, channels, state_size, device_type) if save_states else (0,)
    states = inputs.x.new_empty(shape)
    final = inputs.x.new_empty(inputs.final_shape())
    for k in range(routes):
        view = _RouteView(inputs, k, chunk)
        # Elsewhere than on the CPU this would wait for the device.
        if device_type == "cpu" and not ((view.dt >= 0) & (view.dt < torch.inf)).all():
            raise bad_step_error(inputs, inputs.dt, inputs.dt_bias)
        h = _chunk_starts(view)
        if save_states:
            states[k] = h
        y_route = torch.empty_like(view.x)
        for step in range(chunk):
            h.mul_(view.decay(step)).add_(view.drive(step))
            y_route[:, step] = torch.matmul(h, view.C[:, step].unsqueeze(-1)).squeeze(-1)
        if view.D is not None:
            y_route += view.D * view.x
        merged = inputs.merge == "sum"
        view.scatter(view._hide(y_route), y if merged else y[:, k], add=merged)
        if inputs.final_state:
            final[:, k] = h[:, -1]  # padding after the last token passes the state unchanged
    return y, states, final


def backward(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``inputs.differentiable`` (None where the input is None), in the compute dtype."""
    return from_per_channel(inputs, _backward(to_per_channel(inputs.in_compute_dtype()), dy, dfinal, states))


def _backward(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> tuple[Tensor | None, ...]:
    dy = dy.to(inputs.compute_dtype)
    batch, length, channels, routes, state_size = inputs.sizes
    chunk = _chunk_size(batch, length, channels, state_size, inputs.x.device.type)
    dx, ddt, dA, dB, dC = (_zeros(t) for t in (inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C))
    dD, ddt_bias = (None if t is None else _zeros(t) for t in (inputs.D, inputs.dt_bias))
    for k in range(routes):
        view = _RouteView(inputs, k, chunk)
        dy_route = view.gather_gradient(dy if inputs.merge == "sum" else dy[:, k])
        gradient = _route_backward(view, states[k], dy_route, None if dfinal is None else dfinal[:, k])
        if view.D is not None and dD is not None:
            gradient["x"] += view.D * dy_route
            dD[k] = (view.x * dy_route).sum((0, 1, 2))
        raw_gradient = gradient["dt"] * torch.sigmoid(view.raw) if inputs.dt_softplus else gradient["dt"]
        raw_gradient = view._hide(raw_gradient)
        if ddt_bias is not None:
            ddt_bias[k] = raw_gradient.sum((0, 1, 2))
        dA[k] = gradient["A"]
        view.scatter(view._hide(gradient["x"]), dx, add=True)
        view.scatter(raw_gradient, ddt[:, :, k])
        view.scatter(view._hide(gradient["B"]), dB[:, :, k])
        view.scatter(view._hide(gradient["C"]), dC[:, :, k])
    return dx, ddt, dA, dB, dC, dD, ddt_bias


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _route_backward(view: _RouteView, chunk_starts: Tensor, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of one route in its chunked order; the direct path D is added by the caller."""
    gradient = {
        "x": torch.empty_like(view.x),
        "dt": torch.empty_like(view.dt),
        "A": torch.zeros_like(view.A),
        "B": torch.empty_like(view.B),
        "C": torch.empty_like(view.C),
    }
    from_later = _gradients_from_later_chunks(view, dy, dfinal)
    per_chunk = view.chunk * chunk_starts[:, 0].numel()
    group = max(1, _BACKWARD_ELEMENTS.get(view.x.device.type, _BACKWARD_ELEMENTS["cuda"]) // per_chunk)
    for first in range(0, view.chunks, group):
        part = slice(first, min(first + group, view.chunks))
        _group_backward(view, part, chunk_starts[:, part], from_later[:, part], dy[:, :, part], gradient)
    return gradient


def _gradients_from_later_chunks(view: _RouteView, dy: Tensor, dfinal: Tensor | None) -> Tensor:
    """dL/dh at the end of every chunk as seen from what comes after it, (batch, M, C, N)."""
    g = view.zero_state()
    if view.chunks > 1:
        for step in range(view.chunk - 1, -1, -1):
            g.add_(dy[:, step].unsqueeze(-1) * view.C[:, step, :, None, :]).mul_(view.decay(step))
        g = _carry(g, view.chunk_decay(), reverse=True, last=dfinal)
    elif dfinal is not None:
        g[:, 0] = dfinal
    return g


def _group_backward(
    view: _RouteView, part: slice, start: Tensor, from_later: Tensor, dy: Tensor, gradient: dict[str, Tensor]
) -> None:
    """Recompute the states of a group of chunks, then sweep them backwards."""
    decays, states = [], [start]
    for step in range(view.chunk):
        decays.append(view.decay(step, part))
        states.append(decays[-1] * states[-1] + view.drive(step, part))
    g = from_later.clone()
    for step in range(view.chunk - 1, -1, -1):
        x, dt, B, C = (t[:, step, part] for t in (view.x, view.dt, view.B, view.C))
        dy_step = dy[:, step]
        g.add_(dy_step.unsqueeze(-1) * C.unsqueeze(-2))
        gradient["C"][:, step, part] = torch.matmul(dy_step.unsqueeze(-2), states[step + 1]).squeeze(-2)
        gradient["B"][:, step, part] = torch.matmul((dt * x).unsqueeze(-2), g).squeeze(-2)
        g_B = torch.matmul(g, B.unsqueeze(-1)).squeeze(-1)
        gradient["x"][:, step, part] = dt * g_B
        g.mul_(decays[step])
        through_decay = g * states[step]
        gradient["dt"][:, step, part] = x * g_B + (through_decay * view.A).sum(-1)
        gradient["A"] += (through_decay * dt.unsqueeze(-1)).sum_to_size(view.A.shape)
