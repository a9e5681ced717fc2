"""The networks that a package may name, and how they are built from a file that nobody vouches for.

Names in a file are looked up in the tables here; nothing is imported because a file says so. A network is first built
without memory for its weights (on torch's meta device) and compared with the weights that are there.
"""

from __future__ import annotations

import importlib
import inspect
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.conv import _ConvNd

from medmamba.mixers import scan_names
from medmamba.networks import NETWORKS
from medmamba.networks.unet import check_divisible, total_strides

from .problems import ModelRefused, shown
from .values import Check, entry, flag, items, mapping, number, optional, size, text, whole, wrong

_DNA = "dynamic_network_architectures"
#: Path in the plans -> module and name. The second path is where nnU-Net looks for one that has moved since.
STOCK: Mapping[str, tuple[str, str]] = {
    f"{_DNA}.architectures.{module}.{name}": (f"{_DNA}.architectures.unet", name)
    for name, modules in {
        "PlainConvUNet": ("unet",),
        "ResidualEncoderUNet": ("unet", "residual_unet"),
        "ResidualUNet": ("unet", "residual_unet"),
    }.items()
    for module in modules
}


def _by_path(*classes: type[nn.Module]) -> dict[str, type[nn.Module]]:
    return {
        path: kind for kind in classes for path in (f"torch.nn.{kind.__name__}", f"{kind.__module__}.{kind.__name__}")
    }


_CONVOLUTIONS = {2: _by_path(nn.Conv2d), 3: _by_path(nn.Conv3d)}
_NORMS = {2: _by_path(nn.InstanceNorm2d, nn.BatchNorm2d), 3: _by_path(nn.InstanceNorm3d, nn.BatchNorm3d)}
_DROPOUTS = _by_path(nn.Dropout, nn.Dropout2d, nn.Dropout3d)
_NONLINEARITIES = _by_path(nn.LeakyReLU, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.PReLU)
_BLOCKS = {
    f"{_DNA}.building_blocks.residual.{name}": (f"{_DNA}.building_blocks.residual", name)
    for name in ("BasicBlockD", "BottleneckD")
}


def _share(value: object, where: str) -> float:
    if not 0 <= number(value, where) <= 1:
        wrong(where, value, "a number from 0 to 1")
    return number(value, where)


def _momentum(value: object, where: str) -> float | None:
    return optional(value, where, _share)


def _approximation(value: object, where: str) -> str:
    if value not in ("none", "tanh"):
        wrong(where, value, "none or tanh")
    return str(value)


#: Arguments that hold arguments of a class. Others of torch (``device``) would take memory elsewhere.
_NESTED: Mapping[str, Mapping[str, Check[object]]] = {
    "norm_op_kwargs": {"eps": size, "affine": flag, "momentum": _momentum, "track_running_stats": flag},
    "dropout_op_kwargs": {"p": _share, "inplace": flag},
    "nonlin_kwargs": {"inplace": flag, "negative_slope": number, "alpha": number, "approximate": _approximation},
}
_BLOCK_KEYS = ("network_class_name", "arch_kwargs", "_kw_requires_import")
#: Arguments that the dataset and the use decide.
_NOT_ARGUMENTS = ("input_channels", "num_classes", "deep_supervision")
_LARGEST_NUMBER, _LONGEST_LIST, _LONGEST_TEXT, _DEEPEST = 2**16, 64, 200, 4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Blueprint:
    """What a network is before it has weights.

    Attributes:
        tensors: a tensor without memory for every weight, each under one name.
        aliases: every key of the state dict -> that name.
        channel_axes: weights of convolutions and linear maps -> the axis of their output channels.
        scans: paths of the scans.
    """

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    channel_axes: Mapping[str, int]
    scans: Sequence[str]


def check_architecture(value: object, where: str, patch_size: Sequence[int]) -> None:
    """Raise unless an architecture block of plans names a network that a package may name, with arguments for it.

    Raises:
        ModelRefused: MM-MD-009, MM-MD-010, MM-MD-012.
    """
    block = mapping(value, where, _BLOCK_KEYS)
    name = text(block["network_class_name"], f"{where}.network_class_name")
    if name not in STOCK and name not in _own():
        raise ModelRefused(
            "MM-MD-010",
            f"model.json: {where}.network_class_name is {shown(name)}, which is no network that a package may name; "
            f"known: {', '.join([*_own(), *STOCK])}; a newer medmamba may have it",
        )
    arguments = mapping(block["arch_kwargs"], f"{where}.arch_kwargs")
    _check_plain(arguments, f"{where}.arch_kwargs")
    _check_strides(arguments, f"{where}.arch_kwargs", patch_size)
    imports = items(block["_kw_requires_import"], f"{where}._kw_requires_import", text)
    if name in STOCK:
        _check_stock(arguments, imports, where, len(patch_size))
    elif imports:
        wrong(f"{where}._kw_requires_import", imports, f"nothing: {name} has no arguments to import")


def network_name(block: Mapping[str, Any]) -> str:
    """What to call the network of a checked block: "vmunet", "PlainConvUNet"."""
    path = str(block["network_class_name"])
    return _own().get(path) or path.rpartition(".")[2]


def build(block: Mapping[str, Any], input_channels: int, num_classes: int) -> nn.Module:
    """The network of a checked block, in eval mode and without deep supervision, on torch's current device.

    Raises:
        ModelRefused: MM-MD-012.
    """
    name, arguments = block["network_class_name"], dict(block["arch_kwargs"])
    function = _imported(*STOCK[name]) if name in STOCK else _imported(*name.rsplit(".", 1))
    if name in STOCK:
        ndim = len(arguments["strides"][0])
        tables = _tables(ndim)
        for key in block["_kw_requires_import"]:
            arguments[key] = _looked_up(arguments[key], tables[key])
    elif "dt_init" in arguments:
        arguments["dt_init"] = None  # initial values only, and the weights bring their own
    known = inspect.signature(function).parameters
    surplus = [key for key in arguments if key not in known or key in _NOT_ARGUMENTS]
    if surplus:
        raise ModelRefused(
            "MM-MD-012",
            f"{network_name(block)} has no argument {shown(surplus[0])}; install the version of medmamba that wrote "
            "the package",
        )
    try:
        network: nn.Module = function(
            input_channels=input_channels, num_classes=num_classes, **arguments, deep_supervision=False
        )
    except ModelRefused:
        raise
    except Exception as error:  # whatever a constructor makes of a stranger's arguments
        raise ModelRefused(
            "MM-MD-012",
            f"{network_name(block)} refuses its arguments ({type(error).__name__}: {shown(str(error))}); get the "
            "package again, or install the version of medmamba that wrote it",
        ) from error
    return network.eval()


def blueprint_of(block: Mapping[str, Any], input_channels: int, num_classes: int, num_tensors: int) -> Blueprint:
    """Names and shapes of the weights of a network, found without memory for them.

    Args:
        block: checked.
        input_channels: image channels.
        num_classes: outputs.
        num_tensors: how many tensors there are to load. A network with far more is not built to its end.

    Raises:
        ModelRefused: MM-MD-012, MM-MD-013.
    """
    with torch.device("meta"), _limited(num_tensors):
        network = build(block, input_channels, num_classes)
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in network.state_dict(keep_vars=True).items():
        name = aliases[key] = names.setdefault(id(tensor), key)
        tensors.setdefault(name, tensor.detach())
    linear = [module for module in network.modules() if isinstance(module, nn.Linear | _ConvNd)]
    axes = {names[id(module.weight)]: _channel_axis(module) for module in linear}
    return Blueprint(tensors, aliases, axes, scan_names(network))


def _channel_axis(module: nn.Linear | _ConvNd) -> int:
    """Axis of the output channels: transposed convolutions have it second, unless each channel is by itself."""
    is_transposed = isinstance(module, _ConvNd) and module.transposed
    return 1 if is_transposed and module.weight.shape[1] > 1 else 0


@contextmanager
def _limited(num_tensors: int) -> Iterator[None]:
    """Within this context, this thread builds no network with far more parts than there are tensors for it."""
    limits = {"tensors": 4 * num_tensors + 64, "modules": 16 * num_tensors + 1024}
    owner = threading.get_ident()

    def count(what: str) -> None:
        if threading.get_ident() != owner:
            return
        limits[what] -= 1
        if limits[what] < 0:
            raise ModelRefused(
                "MM-MD-013", f"the network of model.json has far more {what} than the {num_tensors} tensors of its file"
            )

    handles = [
        torch_module.register_module_parameter_registration_hook(lambda *_: count("tensors")),
        torch_module.register_module_buffer_registration_hook(lambda *_: count("tensors")),
        torch_module.register_module_module_registration_hook(lambda *_: count("modules")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own() -> dict[str, str]:
    """Import path of every network of ours -> its registry name."""
    return {spec.build: spec.name for spec in NETWORKS.values()}


def _imported(module: str, name: str) -> Any:
    """Something named in a table of this module or in the registry, never by a file."""
    return getattr(importlib.import_module(module), name)


def _tables(ndim: int) -> dict[str, Mapping[str, Any]]:
    return {
        "conv_op": _CONVOLUTIONS[ndim],
        "norm_op": _NORMS[ndim],
        "dropout_op": _DROPOUTS,
        "nonlin": _NONLINEARITIES,
        "block": _BLOCKS,
    }


def _looked_up(path: str | None, table: Mapping[str, Any]) -> Any:
    if path is None:
        return None
    found = table[path]
    return _imported(*found) if isinstance(found, tuple) else found


def _check_stock(arguments: Mapping[str, Any], imports: Sequence[str], where: str, ndim: int) -> None:
    tables = _tables(ndim)
    for key in imports:
        if key not in tables:
            wrong(f"{where}._kw_requires_import", key, " or ".join(tables))
        entry(dict(arguments), key, f"{where}.arch_kwargs")
    for key, table in tables.items():
        path = arguments.get(key)
        if path is None:
            continue
        if key not in imports:
            wrong(f"{where}._kw_requires_import", list(imports), f"also {key}")
        if not isinstance(path, str) or path not in table:
            raise ModelRefused(
                "MM-MD-010",
                f"model.json: {where}.arch_kwargs.{key} is {shown(path)}, which is no class that a package may name "
                f"for {ndim} axes; known: {', '.join(table)}",
            )
    for key, allowed in _NESTED.items():
        if arguments.get(key) is None:
            continue
        for name, value in mapping(arguments[key], f"{where}.arch_kwargs.{key}").items():
            if name not in allowed:
                wrong(f"{where}.arch_kwargs.{key}", name, " or ".join(allowed))
            allowed[name](value, f"{where}.arch_kwargs.{key}.{name}")


def _check_strides(arguments: Mapping[str, Any], where: str, patch_size: Sequence[int]) -> None:
    ndim = len(patch_size)

    def stride(value: object, place: str) -> list[int]:
        return items(value, place, lambda each, at: whole(each, at, 1, 64), length=ndim)

    strides = items(entry(dict(arguments), "strides", where), f"{where}.strides", stride)
    try:
        check_divisible(tuple(patch_size), total_strides(strides)[-1])
    except (ValueError, IndexError) as error:
        wrong(f"{where}.strides", strides, f"strides that divide the patch {list(patch_size)} ({shown(str(error))})")


def _check_plain(value: object, where: str, depth: int = 0) -> None:
    """Values of a size that a constructor may be called with: no loop over 10^12 blocks."""
    if isinstance(value, dict | list):
        if len(value) > _LONGEST_LIST or depth >= _DEEPEST:
            wrong(where, value, f"at most {_LONGEST_LIST} values and {_DEEPEST} levels")
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(each, f"{where}.{key}", depth + 1)
    elif isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            wrong(where, value, f"a text of at most {_LONGEST_TEXT} letters")
    elif isinstance(value, float) and not math.isfinite(value):
        wrong(where, value, "a number")
    elif isinstance(value, int | float) and abs(value) > _LARGEST_NUMBER:
        wrong(where, value, f"a number of at most {_LARGEST_NUMBER}")
