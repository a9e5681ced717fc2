"""Reading a file of weights without running code from it."""

from __future__ import annotations

import os
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError

#: Keys under which trainings keep the weights beside other things, in the order in which they are tried.
WRAPPERS = ("network_weights", "model", "model_state_dict", "state_dict")


class _Inert:
    """What stands for a type that a published file holds beside its weights; it does nothing."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


#: numpy's letters for plain numbers, with those of :mod:`struct`.
_NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "b1": "?"}


class _NumberType(_Inert):
    """What stands for ``numpy.dtype``: how the number that follows is written; None where it is no plain number."""

    def __init__(self, code: object = None, *_: object):
        self.code = _NUMBERS.get(code) if isinstance(code, str) else None
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        # (version, "<" or ">" or, where a byte has no order, "|", ...)
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


def _number(kind: object = None, raw: object = None) -> float | int | bool | _Inert:
    """What stands for a numpy scalar: its value, or an inert object where it is no plain number."""
    if not isinstance(kind, _NumberType) or kind.code is None or not isinstance(raw, bytes):
        return _Inert()
    layout = f"{kind.order}{kind.code}"
    value: float | int | bool | _Inert = (
        struct.unpack(layout, raw)[0] if len(raw) == struct.calcsize(layout) else _Inert()
    )
    return value


# VMamba stores its settings (yacs) with the weights, VM-UNet and nnU-Net numpy scalars such as the last loss.
_STAND_INS: list[Any] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU, with what they are wrapped in taken off.

    Args:
        path: a ``.safetensors`` file, or one of ``torch.save``: a state dict, or a training with one under a key of
            ``WRAPPERS``. Pickled code is not run: objects that published files are known to hold beside their weights
            are replaced by harmless ones, any other makes the file unreadable.

    Returns:
        names and tensors as they are in the file.

    Raises:
        WeightsError: the file is missing, damaged, wants to run code, or holds no weights.
    """
    path = _existing(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    candidates = [content, *(content[key] for key in WRAPPERS if isinstance(content, Mapping) and key in content)]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return {str(key): value for key, value in candidate.items()}
    found = f"the keys {_listed(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise WeightsError(
        f"{path} holds {found} and no weights; expected named tensors, at the top or under {' or '.join(WRAPPERS)}"
    )


def read_training(path: str | os.PathLike[str], *, in_place: bool = False) -> dict[str, Any]:
    """A whole checkpoint of a training, as nnU-Net's: ``network_weights`` and what lies beside them, on the CPU.

    Args:
        path: of a file of ``torch.save``. Pickled code is not run, as in :func:`read_checkpoint`; a numpy scalar comes
            as a Python number.
        in_place: leave the tensors in the file, which must stay as it is while they are used: a look at what lies
            beside them costs nothing then.

    Raises:
        WeightsError: the file is missing, damaged, wants to run code, or is no checkpoint of a training.
    """
    path = _existing(path)
    content = _read_pickle(path, in_place)
    weights = content.get("network_weights") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise WeightsError(f"{path} has no network_weights; give a checkpoint that nnU-Net wrote in training")
    return dict(content)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is no file; give a checkpoint (.pth, .pt or .safetensors)")
    return path


def _read_pickle(path: Path, in_place: bool = False) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
    except Exception as error:  # a damaged file makes torch raise anything
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise WeightsError(
                f"{path} is damaged or no file of torch.save ({first_line(error)}); take another copy of it"
            ) from error
        raise WeightsError(
            f"{path} is not weights alone: reading it would run code ({wanted[1]}); where you trust it, save its state "
            "dict alone with torch.save or as safetensors"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors ({first_line(error)}); download it again") from error


def _listed(content: Mapping[Any, Any]) -> str:
    names = [repr(key) for key in content]
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])]) or "(none)"


def first_line(error: BaseException) -> str:
    """First line of what an error says, or its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
