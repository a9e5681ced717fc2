"""The ways to compute the scan. Each backend is a module with the same four functions.

``unavailable_reason(device)``              why it cannot run on a device, or None
``states_shape(batch, length, ...)``        shape of the tensor that ``forward`` saves for ``backward``
``forward(inputs, *, save_states)``         (y, states, final): y in raster order and in ``inputs.compute_dtype``;
                                            states of ``states_shape`` (empty without ``save_states``), of no use to
                                            others; the final state of ``inputs.final_shape()``
``backward(inputs, dy, dfinal, states)``    gradients of ``inputs.differentiable``, None where the input is None; dfinal
                                            None when the final state has none

``inputs`` is a :class:`~medmamba_kernels.inputs.ScanInputs`. Backends compute; they choose nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import torch

from . import chunked, gpu, native

BACKENDS: dict[str, ModuleType] = {"native": native, "torch": chunked, "triton": gpu}

# The fast backend of a device, and how much slower the scan is without it: native measured
# (kernels/bench/results); triton is unmeasured, and therefore proves its numbers on the device before it is used.
_FAST = {"cpu": ("native", "about 20 times slower"), "cuda": ("triton", "many times slower (not measured)")}


_assumed: ContextVar[str | None] = ContextVar("assumed", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


@contextmanager
def assume_backend(name: str | None) -> Iterator[None]:
    """Within, "auto" is this backend, whether it can run here or not: for scans on tensors without data, to count what
    they would keep on another machine. None leaves the choice as it is.

    Raises:
        ValueError: an unknown name.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; known: {', '.join(BACKENDS)}")
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


# To torch.compile the choice is a constant of the graph: looking for a library on disk is not traced.
@torch.compiler.assume_constant_result
def choose_backend(requested: str, device: torch.device) -> str:
    """Name of the backend to use.

    Args:
        requested: "auto" (the environment variable ``MEDMAMBA_BACKEND`` if set; else native on CPUs, triton on GPUs
            where it passes its self-test, and torch with one warning where these cannot run) or a name, which is used
            or raises.
        device: where the tensors are.

    Raises:
        ValueError: an unknown name.
        BackendError: the named backend cannot run on this device.
    """
    assumed = _assumed.get()
    if assumed is not None and requested == "auto":
        return assumed
    name = os.environ.get("MEDMAMBA_BACKEND", "auto") if requested == "auto" else requested
    if name == "auto":
        return _automatic(device)
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"scan backend {name!r} was asked for but cannot run on {device}: {reason}")
    return name


@lru_cache(maxsize=64)
def _automatic(device: torch.device) -> str:
    if device.type not in _FAST:
        return "torch"
    name, slower = _FAST[device.type]
    reason = BACKENDS[name].unavailable_reason(device)
    if reason is None and name == "triton":
        reason = _failed_self_test(name, device)
    if reason is None:
        return name
    warnings.warn(
        f"the scan runs in plain PyTorch, {slower}: its {name} backend cannot be used on {device} ({reason}). "
        "`medmamba doctor` shows the backends; MEDMAMBA_BACKEND=torch silences this",
        stacklevel=2,
    )
    return "torch"


def _failed_self_test(name: str, device: torch.device) -> str | None:
    """Why a backend does not give the reference's numbers on a device, or None if it does."""
    from medmamba_kernels.testing import self_test

    try:
        with torch.inference_mode(False), torch.enable_grad():
            error, passed = self_test(name, device)
    except Exception as problem:  # compilers and drivers fail in many ways; the scan goes on without this backend
        return f"its self-test stopped with {type(problem).__name__}: {problem}"
    return None if passed else f"its self-test fails, error {error:.1e}"
