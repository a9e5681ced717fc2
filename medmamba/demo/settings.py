"""What the demo trains and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from medmamba.command import CommandError

if TYPE_CHECKING:
    from medmamba_plans.derive import Request

CONFIGURATION = "3d_fullres"
ITERATIONS = 400

#: More epochs make the learning rate smoother; each costs a progress.png and a checkpoint.
_MAX_EPOCHS = 20


@dataclass(frozen=True)
class Settings:
    """What the demo trains and for how long.

    Attributes:
        network: name in the registry.
        variant: one of the network's named argument sets.
        iterations: optimizer steps, rounded up so that all epochs are equally long.
        seed: for initial weights, patches and augmentation.
        optimizer: as in :class:`medmamba.nnunet.schedule.Schedule`.
        learning_rate: the highest; after one epoch of warm-up it falls to zero.
        batch_size: patches per step.
    """

    network: str = "vmunet"
    variant: str = "small"
    iterations: int = ITERATIONS
    seed: int = 0
    optimizer: str = "AdamW"
    learning_rate: float = 3e-3
    batch_size: int = 2

    @property
    def num_epochs(self) -> int:
        return min(self.iterations, _MAX_EPOCHS)

    @property
    def iterations_per_epoch(self) -> int:
        return ceil(self.iterations / self.num_epochs)

    @property
    def total_iterations(self) -> int:
        return self.num_epochs * self.iterations_per_epoch

    def request(self) -> Request:
        """What to plan.

        Raises:
            CommandError: an unknown network or variant, or a value out of range.
        """
        from medmamba.nnunet.errors import UserFacingError
        from medmamba.nnunet.schedule import Schedule
        from medmamba_plans.derive import Request

        try:
            schedule = Schedule.create(
                num_epochs=self.num_epochs,
                num_iterations_per_epoch=self.iterations_per_epoch,
                num_val_iterations_per_epoch=1,
                optimizer=self.optimizer,
                initial_lr=self.learning_rate,
                warmup_epochs=min(1, self.num_epochs - 1),
            )
            return Request(
                network=self.network,
                variant=self.variant,
                batch_size=self.batch_size,
                schedule=schedule,
                configurations=[CONFIGURATION],
            )
        except UserFacingError as error:
            raise CommandError(str(error)) from error
