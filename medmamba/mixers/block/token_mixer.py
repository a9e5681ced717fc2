"""Projections, local part, gate and modulation around the mixing of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.mixers.mask import keep

from .modulation import AffinityModulation, SqueezeExcite
from .tokens import Grid

#: What the gate does to its half of the in-projection.
GATES: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda z: z, "silu": F.silu}
MODULATIONS = ("affinity", "se")


class TokenMixer(nn.Module):
    """in-projection -> local part -> mixing -> norm -> modulation -> gate -> out-projection. (B, L, C) -> same.

    Args:
        width: C.
        expand: E / C; None leaves the projections out, then E is C and there is no gate.
        local: builds what precedes the mixing from E, or None.
        mixing: builds the mixing from E.
        has_norm: LayerNorm behind the mixing.
        modulation: one of ``MODULATIONS``, or None.
        gate: one of ``GATES``, or None.

    Raises:
        ValueError: a gate without projections, or a modulation by the input with another width than the input's.
    """

    def __init__(
        self,
        width: int,
        *,
        expand: float | None,
        local: Callable[[int], nn.Module] | None,
        mixing: Callable[[int], nn.Module],
        has_norm: bool,
        modulation: str | None,
        gate: str | None,
    ):
        super().__init__()
        inner = width if expand is None else int(expand * width)
        if expand is None and gate is not None:
            raise ValueError(f"the gate {gate!r} needs an in-projection; give expand, or leave the gate out")
        if modulation == "affinity" and inner != width:
            raise ValueError(f"affinity multiplies with the input of {width} channels, not {inner}; set expand to 1")
        self.gate = gate
        self.in_proj = None if expand is None else nn.Linear(width, 2 * inner if gate else inner, bias=False)
        self.local = None if local is None else local(inner)
        self.mixing = mixing(inner)
        self.norm = nn.LayerNorm(inner) if has_norm else None
        self.squeeze = SqueezeExcite(inner) if modulation == "se" else None
        self.affinity = AffinityModulation(inner) if modulation == "affinity" else None
        self.out_proj = None if expand is None else nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Tensor:
        x, z = u, None
        if self.in_proj is not None:
            x, *gates = self.in_proj(u).chunk(2 if self.gate else 1, dim=-1)
            z = gates[0] if gates else None
        if self.local is not None:
            x = self.local(x, grid, mask=mask)
        y = self.mixing(x, grid, mask=mask)
        if self.norm is not None:
            y = self.norm(y)
        if self.squeeze is not None:
            y = self.squeeze(y, grid, mask=mask)
        if self.affinity is not None:
            y = self.affinity(y, u, grid, mask=mask)
        if z is not None and self.gate is not None:
            y = y * GATES[self.gate](z)
        y = y.to(u.dtype) if self.out_proj is None else self.out_proj(y)
        return keep(y, mask)
