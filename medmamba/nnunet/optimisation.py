"""Optimizer and learning rate of a :class:`~medmamba.nnunet.schedule.Schedule`."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from medmamba.layers import parameter_groups
from medmamba.nnunet.schedule import Schedule

#: Exponent of nnU-Net's polynomial decay.
EXPONENT = 0.9


def learning_rate(epoch: int, schedule: Schedule) -> float:
    """Learning rate of an epoch (counted from 0).

    With ``w`` warm-up epochs out of ``n``: ``initial_lr * (epoch + 1) / w`` while ``epoch < w``, then, at
    ``t = (epoch - w) / (n - w)``, nnU-Net's ``initial_lr * (1 - t) ** 0.9`` or ``initial_lr * (1 + cos(pi t)) / 2``.
    """
    warmup = schedule.warmup_epochs
    if epoch < warmup:
        return schedule.initial_lr * (epoch + 1) / warmup
    progress = min((epoch - warmup) / (schedule.num_epochs - warmup), 1.0)
    falling = (1 + math.cos(math.pi * progress)) / 2 if schedule.lr_decay == "cosine" else (1 - progress) ** EXPONENT
    return schedule.initial_lr * falling


class WarmupLR(LRScheduler):
    """A linear warm-up, then the decay of the schedule; stepped once per epoch, with the epoch's number."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.schedule = schedule
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of ``epoch``, or of the next epoch when none is given."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count = getattr(self, "_step_count", 0) + 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.last_epoch, self.schedule)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def configure(network: nn.Module, schedule: Schedule) -> tuple[Optimizer, WarmupLR]:
    """Optimizer with its two weight-decay groups, and the learning-rate schedule."""
    groups = parameter_groups(network, schedule.weight_decay)
    optimizer: Optimizer
    if schedule.optimizer == "SGD":
        optimizer = SGD(groups, lr=schedule.initial_lr, momentum=0.99, nesterov=True)
    else:
        optimizer = AdamW(groups, lr=schedule.initial_lr, eps=schedule.eps)
    return optimizer, WarmupLR(optimizer, schedule)
