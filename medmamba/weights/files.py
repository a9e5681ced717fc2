"""Reading a file of weights without running code from it."""

from __future__ import annotations

import os
import re
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
    """What stands for a number or type that a published file holds beside its weights; it does nothing."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


# VMamba stores its settings (yacs) with the weights, VM-UNet and nnU-Net numpy scalars such as the last loss.
_STAND_INS: list[Any] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (_Inert, "numpy.dtype"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU, with what they are wrapped in taken off.

    Args:
        path: a ``.safetensors`` file, or one of ``torch.save``: a state dict, or a training with one under a key of
            ``WRAPPERS``. Pickled code is not run: objects that published files are known to hold beside their weights
            are replaced by inert ones, any other makes the file unreadable.

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


def read_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A whole checkpoint of a training, as nnU-Net's: ``network_weights`` and what lies beside them, on the CPU.

    Args:
        path: of a file of ``torch.save``. Pickled code is not run, as in :func:`read_checkpoint`; a numpy scalar comes
            as an object without a value.

    Raises:
        WeightsError: the file is missing, damaged, wants to run code, or is no checkpoint of a training.
    """
    path = _existing(path)
    content = _read_pickle(path)
    weights = content.get("network_weights") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise WeightsError(f"{path} has no network_weights; give a checkpoint that nnU-Net wrote in training")
    return dict(content)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is no file; give a checkpoint (.pth, .pt or .safetensors)")
    return path


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise WeightsError(
                f"{path} is damaged or no file of torch.save ({first_line(error)}); download it again"
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
