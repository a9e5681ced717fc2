"""The model of a run and its optimizer: what one step does to them, in one process or many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medmamba.command import CommandError
from medmamba.networks import create_network
from medmamba_kernels import BadStepError
from medmamba_pretrain.model import Pretraining
from medmamba_pretrain.recipe import Recipe

from .normalisation import normalise
from .precision import Precision
from .processes import Processes
from .schedule import learning_rate, optimizer_of, set_learning_rate
from .stream import Crops


class Learner:
    """Model and optimizer of a recipe, initialised with its seed.

    Args:
        recipe: what to build.
        processes: this one among all.

    Attributes:
        model: the same in all processes.
        precision: to compute in, and where.

    Raises:
        CommandError: the network or the objective refuses the recipe.
    """

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self._recipe, self._processes = recipe, processes
        self.precision = Precision.of(recipe, processes.device)
        try:
            torch.manual_seed(recipe.seed)
            network = create_network(recipe.network, 1, 2, **recipe.network_arguments)
            self.model = Pretraining(network, recipe).to(processes.device, self.precision.dtype)
        except (ValueError, TypeError, KeyError) as error:
            raise CommandError(f"recipe: {error.args[0] if error.args else error}") from error
        self._optimizer = optimizer_of(self.model, recipe)
        # Without device_ids, units stay on the CPU, where looking at them does not wait for the GPU.
        self._shared = DistributedDataParallel(self.model) if processes.count > 1 else None

    def step(self, number: int, micro_batches: Sequence[Crops], targets: int) -> dict[str, float]:
        """One optimizer step.

        Args:
            number: of the step, from 0.
            micro_batches: of this process.
            targets: units asked for, in all micro-batches of all processes.

        Returns:
            what to show, by TensorBoard's tags.

        Raises:
            CommandError: the loss or its gradients are not finite; the weights are as they were.
        """
        # For layers that draw by themselves, such as stochastic depth: a step does not depend on those before it.
        seeds = np.random.SeedSequence((self._recipe.seed, number, self._processes.rank))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        rate = learning_rate(number, self._recipe)
        set_learning_rate(self._optimizer, rate)
        loss = 0.0
        try:
            for i, crops in enumerate(micro_batches):
                with self._exchange(is_last=i + 1 == len(micro_batches)):
                    loss += self._backward(crops, targets)
        except BadStepError as error:  # a scan on the CPU looks at its step sizes
            raise _diverged(number, str(error)) from error
        (loss,) = self._processes.sum([loss])
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.clip_norm))
        if not math.isfinite(norm):
            raise _diverged(number, f"gradients are not finite, the loss is {loss:g}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"train/loss": loss, "train/lr": rate, "train/gradient_norm": norm}

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs."""
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to a state of the same recipe."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _backward(self, crops: Crops, targets: int) -> float:
        """Loss of one micro-batch, its gradients added. The sum over all is the mean over a step's targets."""
        device = self.precision.device
        stored, constants = (part.to(device, non_blocking=True) for part in (crops.stored, crops.constants))
        image = normalise(stored, constants, self.precision.dtype)
        with self.precision.autocast():
            loss = (self._shared or self.model)(image, crops.visible, crops.target, targets)
        # DistributedDataParallel takes the mean over the processes of what is to be summed.
        (loss * self._processes.count).backward()
        return float(loss.detach())

    def _exchange(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients with the last micro-batch only."""
        return nullcontext() if self._shared is None or is_last else self._shared.no_sync()


def _diverged(step: int, what: str) -> CommandError:
    return CommandError(
        f"training diverged at step {step}: {what}; weights from before are in the last checkpoint. Start again in "
        "another --out with a lower lr, a longer warm-up, or precision=float32",
        exit_code=1,
    )
