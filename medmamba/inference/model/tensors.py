"""Weights of a fold: one safetensors file, which belongs to one model.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .problems import ModelRefused, shown
from .rounding import SCALE, Layout, check_int8

#: Keys in the header of a file: SHA-256 of the model.json that it belongs to, and its fold.
BINDING, FOLD = "medmamba_model_sha256", "medmamba_fold"

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def to_bytes(tensors: Mapping[str, Tensor], binding: str, fold: str) -> bytes:
    """Content of a file of weights."""
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {BINDING: binding, FOLD: fold})


def count_tensors(path: Path) -> int:
    """Number of weights in a file.

    Raises:
        ModelRefused: MM-MD-014.
    """
    with _opened(path) as file:
        return sum(not name.endswith(SCALE) for name in file.keys())  # noqa: SIM118 (no mapping)


def check_file(path: Path, expected: Layout, binding: str, fold: str) -> None:
    """Raise unless a file holds the expected tensors, all of them finite. One tensor is in memory at a time.

    Raises:
        ModelRefused: MM-MD-014 to MM-MD-017, MM-MD-019.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if (metadata.get(BINDING), metadata.get(FOLD)) != (binding, fold):
            raise ModelRefused(
                "MM-MD-016", f"{path} was not exported with this model.json and as fold {fold}; get the package again"
            )
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        found = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
        wanted = {name: (shape, _NAMES.get(dtype)) for name, (shape, dtype) in expected.items()}
        check_fit(path, found, wanted)
        for name in found:
            check_values(path, name, file.get_tensor(name))


def from_bytes(content: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors of a file.

    Raises:
        ModelRefused: MM-MD-014.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def check_fit(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise unless names, shapes and types are equal.

    Raises:
        ModelRefused: MM-MD-015.
    """
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
        "of another shape or type": [name for name in wanted if name in found and found[name] != wanted[name]],
    }
    listed = [f"{len(names)} {what}, e.g. {shown(names[0])}" for what, names in problems.items() if names]
    if listed:
        raise ModelRefused(
            "MM-MD-015",
            f"the weights in {path} do not fit the network that the plans name ({'; '.join(listed)}); they are of "
            "another network",
        )


def check_values(path: Path, name: str, tensor: Tensor) -> None:
    """Raise unless a tensor of a file of weights is finite, and what its type allows.

    Raises:
        ModelRefused: MM-MD-017, MM-MD-019.
    """
    check_finite(path, name, tensor)
    check_int8(path, name, tensor)


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise unless every value is finite.

    Raises:
        ModelRefused: MM-MD-017.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ModelRefused(
            "MM-MD-017", f"{shown(name)} in {path} is NaN or infinite somewhere; take a checkpoint of an earlier epoch"
        )


def facts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor, to be compared."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def parameters(tensors: Iterable[Tensor]) -> int:
    """Number of floating-point values."""
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelRefused:
    return ModelRefused(
        "MM-MD-014", f"{path} cannot be read as safetensors ({shown(str(error))}); it is cut short: get it again"
    )
