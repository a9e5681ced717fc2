"""Which parameters weight decay must leave alone."""

from __future__ import annotations

from typing import Any

from torch import nn

_FLAG = "_no_weight_decay"


def exempt_from_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter (A_log, D, dt bias, ...) that weight decay would bend away from its meaning."""
    setattr(parameter, _FLAG, True)
    return parameter


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: weights with ``weight_decay``; norms, biases and exempted parameters without.

    Published repositories mark A_log and D as "no decay" and then pass plain ``model.parameters()``; here the
    mark counts. A parameter with one dimension or none is a bias or a norm.

    Args:
        module: the network.
        weight_decay: decay of the first group.

    Returns:
        two dicts, ``{"params": [...], "weight_decay": ...}``, together holding every trainable parameter once.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    exempt = [p for p in trainable if p.dim() <= 1 or getattr(p, _FLAG, False)]
    exempt_ids = {id(p) for p in exempt}
    decayed = [p for p in trainable if id(p) not in exempt_ids]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
