"""What a pretraining hides and asks for: objectives by name.

An objective decides which units of a crop are visible, which of the others have to be predicted, what stands in their
places behind the encoder, and which scales the decoder sees:

==================  ==========================================================================================
``mambamim``        random units; token interpolation at the coarsest scale, a learned token at the finer ones
                    (Tang et al., "MambaMIM", 2024, arXiv:2408.08070)
``spark``           the same with learned tokens at every scale (Tian et al., "SparK", 2023, arXiv:2301.03580)
``mae``             the same, and the decoder sees the coarsest scale only (He et al., "Masked Autoencoders Are
                    Scalable Vision Learners", 2021, arXiv:2111.06377)
``autoregressive``  the first units of a route are visible, the next ones are asked for
==================  ==========================================================================================

``autoregressive`` is next-token prediction for networks whose convolutions and several scan directions know no order:
instead of a causal network, the crop ends where the network may not look further. The length of what is visible is
drawn anew for each crop. Others predict every token from those before it at once, with a network that is causal by
itself (Ren et al., "Autoregressive Pretraining with Mamba in Vision", 2025, arXiv:2406.07537); their next token is a
cluster of patches as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medmamba_kernels import resolve_routes
from medmamba_kernels.routes import route_table

from .masking import draw_units


class Hidden(NamedTuple):
    """What one crop shows and asks for.

    Attributes:
        visible: (*units) bool.
        target: (*units) bool, units to predict; none of them is visible.
    """

    visible: Tensor
    target: Tensor


@dataclass(frozen=True)
class Choices:
    """What a recipe says about the drawing of units; see :class:`.recipe.Recipe`."""

    mask_ratio: float
    horizon: float
    routes: tuple[str, ...]


@dataclass(frozen=True)
class Objective:
    """One entry of ``OBJECTIVES``.

    Attributes:
        summary: one line.
        draw: ``draw(units, choices, generator)`` for one crop.
        fill: at the coarsest scale, where a recipe names none.
        reads_all_scales: whether the decoder gets the features of every scale or of the coarsest only.
    """

    summary: str
    draw: Callable[[Sequence[int], Choices, torch.Generator], Hidden]
    fill: str
    reads_all_scales: bool = True


def random_units(units: Sequence[int], choices: Choices, generator: torch.Generator) -> Hidden:
    """Random units are visible, all others are asked for. See :func:`.masking.draw_units`.

    Raises:
        ValueError: a grid of a single unit.
    """
    visible = draw_units(1, units, choices.mask_ratio, generator=generator)[0]
    return Hidden(visible, ~visible)


def next_units(units: Sequence[int], choices: Choices, generator: torch.Generator) -> Hidden:
    """The first units of a route are visible and the next ``horizon`` of the grid are asked for.

    Route and number of visible units, at least one, are uniform among those that leave enough to ask for.

    Args:
        units: grid of units, two or three axes.
        choices: ``routes`` in axes of (D, H, W), and ``horizon``.
        generator: on the CPU.

    Raises:
        ValueError: a grid of a single unit.
    """
    count = math.prod(units)
    if count < 2:
        raise ValueError(f"a patch of one unit {tuple(units)} has nothing to predict; use a larger patch")
    asked = min(max(1, round(count * choices.horizon)), count - 1)
    depth, height, width = (1,) * (3 - len(units)) + tuple(units)
    orders = route_table(resolve_routes(choices.routes), (depth, height, width)).order.long()
    order = orders[int(torch.randint(len(orders), (), generator=generator))]
    first = 1 + int(torch.randint(count - asked, (), generator=generator))
    visible, target = torch.zeros(2, count, dtype=torch.bool)
    visible[order[:first]] = True
    target[order[first : first + asked]] = True
    return Hidden(visible.view(*units), target.view(*units))


OBJECTIVES: dict[str, Objective] = {
    "mambamim": Objective("random units, token interpolation", random_units, fill="toki"),
    "spark": Objective("random units, learned tokens at every scale", random_units, fill="token"),
    "mae": Objective(
        "random units, learned tokens, no skips to the decoder", random_units, fill="token", reads_all_scales=False
    ),
    "autoregressive": Objective("the next units along a route", next_units, fill="token"),
}


def get_objective(name: str) -> Objective:
    """An entry of ``OBJECTIVES``.

    Raises:
        KeyError: an unknown name; the message lists the known ones.
    """
    if name not in OBJECTIVES:
        raise KeyError(f"no objective {name!r}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
