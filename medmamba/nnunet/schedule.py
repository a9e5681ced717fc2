"""The training schedule as data: part of the plans, under ``plans["medmamba"]["schedule"]``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from medmamba.nnunet.errors import UserFacingError

#: Optimizer -> what it uses when neither the plans nor the paper of the network say otherwise.
#: SGD: Isensee et al., nnU-Net, Nature Methods 2021. AdamW: Ruan et al., VM-UNet, 2024 (arXiv:2402.02491).
OPTIMIZERS: Mapping[str, Mapping[str, float]] = {
    "SGD": {"initial_lr": 1e-2, "weight_decay": 3e-5},
    "AdamW": {"initial_lr": 1e-3, "weight_decay": 1e-2},
}
#: How the learning rate falls.
LR_DECAYS = ("poly", "cosine")


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
        initial_lr: learning rate after warm-up.
        lr_decay: how it falls from there to zero: ``poly``, nnU-Net's ``(1 - t) ** 0.9``, or ``cosine``.
        weight_decay: for weights; the parameters of the scan, norms and biases have none.
        eps: of AdamW, added to the denominator; SGD has none.
        warmup_epochs: epochs of linear rise before ``initial_lr`` is reached.
        save_every: epochs between two ``checkpoint_latest``.
    """

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    optimizer: str = "SGD"
    initial_lr: float = OPTIMIZERS["SGD"]["initial_lr"]
    lr_decay: str = "poly"
    weight_decay: float = OPTIMIZERS["SGD"]["weight_decay"]
    eps: float = 1e-8
    warmup_epochs: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            _check(name, getattr(self, name), _is_count(getattr(self, name), 1), "a whole number of 1 or more")
        for name, known in (("optimizer", OPTIMIZERS), ("lr_decay", LR_DECAYS)):
            if getattr(self, name) not in known:
                raise ScheduleError(f"no {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("initial_lr", "eps"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and value > 0, "a number above 0")
        is_decay = _is_number(self.weight_decay) and self.weight_decay >= 0
        _check("weight_decay", self.weight_decay, is_decay, "a number of 0 or more")
        fits = _is_count(self.warmup_epochs, 0) and self.warmup_epochs < self.num_epochs
        _check("warmup_epochs", self.warmup_epochs, fits, f"a whole number below num_epochs = {self.num_epochs}")

    @classmethod
    def create(cls, *, adamw: Mapping[str, float] | None = None, **values: Any) -> Schedule:
        """A schedule from some values; a value of None, or one not given, takes the default of its optimizer.

        Args:
            values: by the names of the attributes.
            adamw: what the paper of a network says about AdamW (``NetworkSpec.adamw``), in place of the defaults.

        Raises:
            ScheduleError: an unknown name, or a value out of range.
        """
        given = {name: value for name, value in values.items() if value is not None}
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ScheduleError(f"unknown schedule entry {', '.join(unknown)}; known: {', '.join(known)}")
        optimizer = given.get("optimizer", "SGD")
        usual = {**OPTIMIZERS.get(optimizer, {}), **(adamw or {} if optimizer == "AdamW" else {})}
        return cls(**{**usual, **given})

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any]) -> Schedule:
        """The schedule that a plans dictionary asks for; nnU-Net's own where it is silent.

        Raises:
            ScheduleError: the schedule in the plans has an unknown entry or a value out of range.
        """
        return cls.create(**plans.get("medmamba", {}).get("schedule", {}))

    def for_finetuning(self) -> Schedule:
        """For weights that are not random: a tenth of the learning rate, a warm-up of a twentieth of the epochs.

        With nnU-Net's 1000 epochs these are nnssl's 1e-3 and 50 epochs (Wald et al., CVPR 2025, arXiv:2410.23132).
        """
        warmup = max(self.warmup_epochs, self.num_epochs // 20)
        return replace(self, initial_lr=self.initial_lr / 10, warmup_epochs=warmup)

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
