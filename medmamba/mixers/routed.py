"""What all scans of a volume share: their routes, who of them shares weights, and their step sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmamba_kernels import Route, resolve_routes

from .step_sizes import DtRange, bias_of, range_per_route

#: Which routes share one set of weights: none, those of one direction (forward, reversed), or all.
PARAMETERS = ("route", "direction", "shared")


def parameter_sets(routes: Sequence[Route], parameters: str) -> tuple[int, ...]:
    """For every route the number of its set of weights; sets are numbered in the order of their first route.

    Raises:
        ValueError: ``parameters`` is none of ``PARAMETERS``.
    """
    if parameters not in PARAMETERS:
        raise ValueError(f"parameters must be one of {', '.join(PARAMETERS)}, got {parameters!r}")
    keys = {
        "route": list(range(len(routes))),
        "direction": [int(route.reverse) for route in routes],
        "shared": [0] * len(routes),
    }[parameters]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return tuple(numbers[key] for key in keys)


class RoutedScan(nn.Module):
    """A core that scans a volume along K routes with S <= K sets of weights: what diagnostics and ``dt_init`` ask for.

    A subclass has the parameters ``dt_bias`` (S, c) for c step sizes per token, ``A_log`` (S, c) or (S, c, N), and
    ``D`` (..., E).

    Args:
        d_state: N, states per channel.
        routes: name of a route set, or a list of routes.
        dt_range: step sizes at initialisation, ``(low, high)`` or one such pair per route (JSON-able; see
            :func:`medmamba.mixers.timescale.route_dt_range`). Default: Mamba's (1e-3, 1e-1). A set of weights takes
            the range from the smallest low to the largest high of its routes.
        parameters: which routes share their weights, one of ``PARAMETERS``.

    Attributes:
        routes: K routes.
        sets: for every route the number of its set of weights.
        dt_ranges: (low, high) of every set, as last drawn from.

    Raises:
        ValueError: an unknown route or ``parameters``, or a ``dt_range`` that is not positive and rising, or of another
            number of routes.
    """

    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(self, d_state: int, routes: str | Sequence[str], dt_range: DtRange, parameters: str):
        super().__init__()
        self.d_state = d_state
        self.routes = resolve_routes(routes)
        self.sets = parameter_sets(self.routes, parameters)
        self.dt_ranges = self._range_per_set(dt_range)

    def per_route(self, values: Tensor, dim: int = 0) -> Tensor:
        """Values of S sets along an axis -> those of K routes; the same tensor where every route has its own set."""
        if self.sets == tuple(range(values.shape[dim])):
            return values
        # Not an index: its gradient would be added up in an order that differs from run to run on GPUs.
        return torch.stack([values.select(dim, number) for number in self.sets], dim)

    def step_sizes(self, u: Tensor) -> Tensor:
        """What the scan multiplies A with, for tokens (B, L, E) in raster order: dt (B, L, K, c), positive."""
        raise NotImplementedError

    def reset_step_sizes(self, dt_range: DtRange, *, generator: torch.Generator | None = None) -> None:
        """Draw ``dt_bias`` anew, from another range; everything else stays.

        Args:
            dt_range: as the constructor's.
            generator: of the random numbers, on the device of the parameters; default: torch's own.

        Raises:
            ValueError: as the constructor.
        """
        self.dt_ranges = self._range_per_set(dt_range)
        self._draw_step_sizes(generator)

    @torch.no_grad()
    def _draw_step_sizes(self, generator: torch.Generator | None = None) -> None:
        uniform = torch.empty_like(self.dt_bias).uniform_(generator=generator)
        self.dt_bias.copy_(bias_of(uniform, self.dt_ranges))

    def _range_per_set(self, dt_range: DtRange) -> list[tuple[float, float]]:
        members: dict[int, list[tuple[float, float]]] = {}
        for number, pair in zip(self.sets, range_per_route(dt_range, len(self.routes)), strict=True):
            members.setdefault(number, []).append(pair)
        return [(min(low for low, _ in pairs), max(high for _, high in pairs)) for pairs in members.values()]

    def extra_repr(self) -> str:
        routes = " ".join(str(route) for route in self.routes)
        shared = "" if len(set(self.sets)) == len(self.sets) else f", sets={len(set(self.sets))}"
        return f"width={self.D.shape[-1]}, d_state={self.d_state}, routes={routes}{shared}"
