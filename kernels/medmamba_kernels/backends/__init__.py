"""The ways to compute the scan. Each backend is a module with the same four functions.

``unavailable_reason(device)``              why it cannot run on a device, or None
``states_shape(batch, length, ...)``        shape of the tensor that ``forward`` saves for ``backward``
``forward(inputs, *, save_states)``         (y, states): y in raster order and in ``inputs.compute_dtype``, states of
                                            ``states_shape`` (empty without ``save_states``) and of no use to others
``backward(inputs, dy, states)``            gradients of ``inputs.differentiable``, None where the input is None

``inputs`` is a :class:`~medmamba_kernels.inputs.ScanInputs`. Backends compute; they choose nothing.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from . import chunked, gpu, native

BACKENDS: dict[str, ModuleType] = {"native": native, "torch": chunked, "triton": gpu}

# What "auto" tries, in order of preference. triton joins when its tests marked gpu have passed on a GPU: so far its
# values were checked in Triton's interpreter and its machine code by compiling it.
AUTOMATIC = ("native", "torch")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


# To torch.compile the choice is a constant of the graph: looking for a library on disk is not traced.
@torch.compiler.assume_constant_result
def choose_backend(requested: str, device: torch.device) -> str:
    """Name of the backend to use.

    Args:
        requested: "auto" (the environment variable ``MEDMAMBA_BACKEND`` if set, else the first of ``AUTOMATIC``
            that works) or a name, which is used or raises.
        device: where the tensors are.

    Raises:
        ValueError: an unknown name.
        BackendError: the named backend cannot run on this device.
    """
    name = os.environ.get("MEDMAMBA_BACKEND", "auto") if requested == "auto" else requested
    if name == "auto":
        return next(name for name in AUTOMATIC if BACKENDS[name].unavailable_reason(device) is None)
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"scan backend {name!r} was asked for but cannot run on {device}: {reason}")
    return name
