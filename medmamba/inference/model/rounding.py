"""How weights are stored, and what a network gets of them: float32 always, rounded before where that saves space.

float16 rounds every weight. bfloat16 and int8 round the weights of convolutions and linear maps alone; what else there
is (step sizes, decays and projections of scans, norms, biases) is little and stays float32. int8 is symmetric, with one
scale per output channel::

    scale = max |w| / 127        stored = round(w / scale)        w' = stored * scale,  |w' - w| <= scale / 2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .architecture import Blueprint
from .problems import ModelRefused, shown

#: The first two are all that format 1 of model.json knows.
PRECISIONS = ("float32", "float16", "bfloat16", "int8")
PRECISIONS_OF_FORMAT_1 = PRECISIONS[:2]
#: Behind the name of an int8 tensor: that of its scales. No attribute of a module is called so.
SCALE = ":scale"

_DTYPES = {name: getattr(torch, name) for name in PRECISIONS}
_LARGEST = 127

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout(blueprint: Blueprint, precision: str) -> Layout:
    """Name -> shape and type of every tensor in a file of weights."""
    found: Layout = {}
    for name, tensor in blueprint.tensors.items():
        dtype = _stored_dtype(name, tensor, blueprint, precision)
        found[name] = (tuple(tensor.shape), dtype)
        if dtype == torch.int8 and tensor.is_floating_point():
            found[name + SCALE] = ((tensor.shape[blueprint.channel_axes[name]],), torch.float32)
    return found


def encoded(name: str, tensor: Tensor, blueprint: Blueprint, precision: str, path: Path) -> dict[str, Tensor]:
    """What is stored of one weight.

    Args:
        name: of the weight.
        tensor: finite.
        blueprint: of its network.
        precision: of ``PRECISIONS``.
        path: where it comes from, for the message.

    Raises:
        ModelRefused: MM-MD-036: it becomes infinite.
    """
    dtype = _stored_dtype(name, tensor, blueprint, precision)
    if dtype == torch.int8 and tensor.is_floating_point():
        return _to_int8(name, tensor.detach().float(), blueprint.channel_axes[name])
    stored = tensor.detach().to(dtype)
    if stored.is_floating_point() and not bool(stored.isfinite().all()):
        raise ModelRefused(
            "MM-MD-036",
            f"{shown(name)} in {path} reaches {tensor.abs().max().item():.3g}, and {precision} ends at "
            f"{torch.finfo(dtype).max:.6g}; export with --weights float32",
        )
    return {name: stored}


def decoded(tensors: Mapping[str, Tensor], blueprint: Blueprint) -> dict[str, Tensor]:
    """Weights as the network takes them, from tensors that fit the layout; floats that are no int8 stay as they are."""
    found = {}
    for name in blueprint.tensors:
        scale = tensors.get(name + SCALE)
        found[name] = tensors[name]
        if scale is not None:
            found[name] = found[name].float() * _along(scale, blueprint.channel_axes[name], found[name].ndim)
    return found


def check_int8(path: Path, name: str, tensor: Tensor) -> None:
    """Raise unless a tensor of a file of int8 weights holds what :func:`encoded` writes.

    Raises:
        ModelRefused: MM-MD-019.
    """
    if name.endswith(SCALE) and not bool(((tensor > 0) & (tensor * _LARGEST).isfinite()).all()):
        problem = "is not above 0 everywhere, or too large"
    elif tensor.dtype == torch.int8 and bool((tensor < -_LARGEST).any()):
        problem = f"goes below {-_LARGEST}"
    else:
        return
    raise ModelRefused("MM-MD-019", f"{shown(name)} in {path} {problem}, which no export writes; get the package again")


def _stored_dtype(name: str, tensor: Tensor, blueprint: Blueprint, precision: str) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    rounds = precision == "float16" or name in blueprint.channel_axes
    return _DTYPES[precision] if rounds else torch.float32


def _to_int8(name: str, tensor: Tensor, axis: int) -> dict[str, Tensor]:
    others = [each for each in range(tensor.ndim) if each != axis]
    scale = tensor.abs().amax(others) / _LARGEST
    # Also where the weights of a channel are so small that a step is no number: they are 0 at any scale.
    scale = torch.where(scale > 0, scale, 1)
    stored = (tensor / _along(scale, axis, tensor.ndim)).round().clamp(-_LARGEST, _LARGEST)
    return {name: stored.to(torch.int8), name + SCALE: scale}


def _along(scale: Tensor, axis: int, ndim: int) -> Tensor:
    return scale.view([-1 if each == axis else 1 for each in range(ndim)])
