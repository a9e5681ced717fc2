"""Learning rate and optimizer of a run."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW

from medmamba.layers import parameter_groups
from medmamba_pretrain.recipe import Recipe


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate of a step (counted from 0).

    With w warm-up steps out of n: ``lr (step + 1) / w`` while ``step < w``; then, at ``t = (step - w) / (n - w)``, from
    ``lr`` to ``lr lr_end`` along a cosine.
    """
    warmup = recipe.warmup_steps
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / (recipe.steps - warmup)
    falling = (1 + math.cos(math.pi * progress)) / 2
    return recipe.lr * (recipe.lr_end + (1 - recipe.lr_end) * falling)


def optimizer_of(model: nn.Module, recipe: Recipe) -> AdamW:
    """AdamW with weight decay for weights only."""
    first, second = recipe.betas
    return AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(first, second))


def set_learning_rate(optimizer: AdamW, value: float) -> None:
    """For all groups."""
    for group in optimizer.param_groups:
        group["lr"] = value
