"""The training schedule as data: part of the plans, under ``plans["medmamba"]["schedule"]``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from medmamba.nnunet.errors import UserFacingError

#: Optimizer -> (initial learning rate, weight decay) used when the plans do not say otherwise.
#: SGD: Isensee et al., nnU-Net, Nature Methods 2021. AdamW: Ruan et al., VM-UNet, 2024 (arXiv:2402.02491).
OPTIMIZERS = {"SGD": (1e-2, 3e-5), "AdamW": (1e-3, 1e-2)}


class ScheduleError(UserFacingError, ValueError):
    """A schedule, usually one written in the plans, has an unknown entry or a value out of range."""


@dataclass(frozen=True)
class Schedule:
    """How long and with what to train; named like the attributes of ``nnUNetTrainer`` where it has them.

    Attributes:
        num_epochs: epochs; an epoch is a number of iterations, not a pass over the data.
        num_iterations_per_epoch: optimizer steps per epoch.
        num_val_iterations_per_epoch: batches for the pseudo Dice after each epoch.
        optimizer: ``SGD`` (momentum 0.99, Nesterov) or ``AdamW``.
        initial_lr: learning rate after warm-up; it then falls as ``(1 - t) ** 0.9`` to zero.
        weight_decay: for weights; the parameters of the scan, norms and biases have none.
        warmup_epochs: epochs of linear rise before ``initial_lr`` is reached.
        save_every: epochs between two ``checkpoint_latest``.
    """

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    optimizer: str = "SGD"
    initial_lr: float = OPTIMIZERS["SGD"][0]
    weight_decay: float = OPTIMIZERS["SGD"][1]
    warmup_epochs: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            _check(name, getattr(self, name), _is_count(getattr(self, name), 1), "a whole number of 1 or more")
        if self.optimizer not in OPTIMIZERS:
            raise ScheduleError(f"no optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        _check(
            "initial_lr",
            self.initial_lr,
            _is_number(self.initial_lr) and self.initial_lr > 0,
            "a number above 0",
        )
        _check(
            "weight_decay",
            self.weight_decay,
            _is_number(self.weight_decay) and self.weight_decay >= 0,
            "a number of 0 or more",
        )
        fits = _is_count(self.warmup_epochs, 0) and self.warmup_epochs < self.num_epochs
        _check("warmup_epochs", self.warmup_epochs, fits, f"a whole number below num_epochs = {self.num_epochs}")

    @classmethod
    def create(cls, **values: Any) -> Schedule:
        """A schedule from some values; a value of None, or one not given, takes the default of its optimizer.

        Raises:
            ScheduleError: an unknown name, or a value out of range.
        """
        given = {name: value for name, value in values.items() if value is not None}
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ScheduleError(f"unknown schedule entry {', '.join(unknown)}; known: {', '.join(known)}")
        initial_lr, weight_decay = OPTIMIZERS.get(given.get("optimizer", "SGD"), (None, None))
        if initial_lr is not None:
            given = {"initial_lr": initial_lr, "weight_decay": weight_decay, **given}
        return cls(**given)

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any]) -> Schedule:
        """The schedule that a plans dictionary asks for; nnU-Net's own where it is silent.

        Raises:
            ScheduleError: the schedule in the plans has an unknown entry or a value out of range.
        """
        return cls.create(**plans.get("medmamba", {}).get("schedule", {}))

    def to_dict(self) -> dict[str, Any]:
        """All entries as plain JSON values."""
        return asdict(self)


def _is_count(value: object, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: object, is_good: bool, expected: str) -> None:
    if not is_good:
        raise ScheduleError(f"schedule entry {name} is {value!r}; expected {expected}")
