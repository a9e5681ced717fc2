"""Stop a training before a loss that is not finite reaches the weights, and keep what is needed to see why."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medmamba.nnunet.errors import UserFacingError
from medmamba.training.saving import save


class NonFiniteLossError(UserFacingError, RuntimeError):
    """The training loss or its gradients became NaN or infinite; the text says where and what to do."""


class NonFiniteGradientsError(RuntimeError):
    """Gradients are NaN or infinite; the weights have not been touched."""


def refuse_non_finite_gradients(optimizer: torch.optim.Optimizer) -> float:
    """The Euclidean norm of all gradients; no step is made where it is NaN or infinite.

    The gradients and not the loss are tested, because they are the same on all GPUs of a training: either all of them
    stop or none, where a test of the loss would leave the others waiting. With a ``GradScaler`` the scaler comes
    first: it leaves such steps out by itself.

    Raises:
        NonFiniteGradientsError: a gradient is NaN or infinite.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if not math.isfinite(norm):
        raise NonFiniteGradientsError("the gradients are not finite")
    return norm


def dump(path: Path, batch: Mapping[str, Any], network: nn.Module, facts: Mapping[str, Any]) -> str:
    """Write batch, weights and facts for ``torch.load(path, weights_only=True)``; say where, or why not.

    A disk that is full must not hide the error that led here, so nothing is raised for it.
    """
    content = {
        "data": batch["data"],
        "target": batch["target"],
        "keys": [str(key) for key in batch.get("keys", ())],
        "network_weights": network.state_dict(),
        **facts,
    }
    try:
        save(path, content)
    except OSError as error:
        return f"they could not be written to {path} ({os.strerror(error.errno or 0)})"
    return f"they are in {path}"
