"""The numbers of ``medmamba info`` and their lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from medmamba.diagnostics import (
    GB,
    MemoryModel,
    StepSizes,
    TokenDynamics,
    footprint,
    influence,
    measure_step_sizes,
    memory_tokens,
    operations,
    step_sizes,
    token_dynamics,
)
from medmamba.info.subject import Subject
from medmamba.mixers import PlacedScan, RoutedScan, placed_scans
from medmamba.mixers.timescale import RouteLengths, route_lengths
from medmamba_kernels import ROUTE_SETS

#: Quantiles of the e-folding memory over the state-channels that a line shows; the last is the slowest.
MEMORY_QUANTILES = (0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class ScanInfo:
    """One scan at the patch of the plan.

    Attributes:
        placed: the scan with its name and grid.
        decay: its step sizes and A.
        lengths: of every route, in tokens.
        dynamics: of its weights; None for a scan that has no projections B and C to read and write its state.
    """

    placed: PlacedScan
    decay: StepSizes
    lengths: tuple[RouteLengths, ...]
    dynamics: TokenDynamics | None

    @property
    def routes(self) -> tuple[str, ...]:
        return tuple(str(route) for route in self.placed.core.routes)


def scans_of(subject: Subject, *, measure: bool = False) -> list[ScanInfo]:
    """The scans of a network in the order in which they run; with ``measure``, step sizes on standard normal noise."""
    network = subject.network
    if measure:
        noise = torch.randn(1, subject.input_channels, *subject.patch_size, generator=torch.Generator().manual_seed(0))
        decays = measure_step_sizes(network, noise)
    else:
        sets = step_sizes(network.state_dict())
        decays = {
            name: StepSizes(core.per_route(sets[name].dt), core.per_route(sets[name].A))
            for name, core in network.named_modules()
            if isinstance(core, RoutedScan)
        }
    dynamics = token_dynamics(network.state_dict())
    return [
        ScanInfo(
            scan,
            decays[scan.name],
            tuple(route_lengths(route, scan.grid) for route in scan.core.routes),
            dynamics.get(scan.name),
        )
        for scan in placed_scans(network, subject.input_channels, subject.patch_size)
    ]


def heading(subject: Subject, scans: Sequence[ScanInfo]) -> str:
    """What was looked at, and what it costs: parameters, work and memory, all and those of the scans."""
    total = sum(parameter.numel() for parameter in subject.network.parameters())
    cores = [module for module in subject.network.modules() if isinstance(module, RoutedScan)]
    scanned = sum(parameter.numel() for core in cores for parameter in core.parameters())
    spacing = "" if subject.spacing is None else f" at {_times(f'{mm:.3g}' for mm in subject.spacing)} mm"
    return (
        f"{subject.name}, {subject.input_channels} in, {subject.num_classes} out, "
        f"patch {_times(subject.patch_size)}{spacing}, weights: {subject.weights}\n"
        f"parameters: {total / 1e6:.3f} M, of these {scanned / 1e6:.3f} M ({scanned / total:.1%}) in {len(cores)} scans"
        + "".join(f"\n{line}" for line in costs(subject))
    )


def costs(subject: Subject) -> Iterator[str]:
    """Work and memory at the patch of the plan, and the share of the scans with their projections."""
    macs = operations(subject.network, subject.input_channels, subject.patch_size)
    yield (
        f"forward pass: {macs.total / 1e9:.1f} GMAC, of these {macs.scans / 1e9:.1f} GMAC "
        f"({macs.scans / macs.total:.1%}) in the scans (a scan counts 9 FLOP per token, channel, state and route)"
    )
    counted = footprint(subject.network, subject.input_channels, subject.patch_size)
    model = MemoryModel.load("cuda")
    yield (
        f"training on a GPU in bfloat16, predicted{'' if model.is_calibrated else ' (not calibrated on a GPU)'}: "
        f"{model.without_batch(counted) / GB:.2f} GB + {model.per_sample(counted) / GB:.2f} GB per sample; "
        f"{counted.kept_by_scans / counted.kept:.1%} of what is kept for the backward pass in the scans"
    )


def table(scans: Sequence[ScanInfo], *, by_route: bool = False) -> Iterator[str]:
    """One line per scan, or per route of every scan.

    ``memory``: e-folding memory in tokens over the state-channels, at 10 %, 50 %, 90 % and the slowest. ``left after``:
    mean share of a token's contribution one line, one plane and one volume further along its route; where the state
    is cleared just there, at the last token before. ``eigenvalues``: smallest and largest of the token dynamics.
    """
    width = max(len(scan.placed.name) for scan in scans)
    head = f"{'scan':<{width}}  {'grid':<11} {'tokens':>7} {'chan':>5} {'N':>3}  {'routes':<20}"
    yield f"{head}  {'memory 10/50/90/100 %':<22}  {'line/plane/volume':<19}  {'left after them':<19}  eigenvalues"
    for scan in scans:
        core = scan.placed.core
        chosen = [[k] for k in range(len(scan.routes))] if by_route else [list(range(len(scan.routes)))]
        for routes in chosen:
            memory = memory_tokens(scan.decay.dt[routes], scan.decay.A[routes]).flatten()
            quantiles = memory.quantile(torch.tensor(MEMORY_QUANTILES, dtype=memory.dtype)).tolist()
            names = scan.routes[routes[0]] if by_route else _route_names(scan)
            yield (
                f"{scan.placed.name:<{width}}  {_times(scan.placed.grid):<11} {scan.lengths[0].volume:>7} "
                f"{core.D.shape[-1]:>5} {core.d_state:>3}  {names:<20}  {_slashes(map(_tokens, quantiles)):<22}  "
                f"{_lengths(scan, routes):<19}  {_slashes(map(_percent, _left(scan, routes))):<19}  "
                f"{_eigenvalues(scan, routes)}"
            )


def _left(scan: ScanInfo, routes: Sequence[int]) -> list[float]:
    """Mean surviving share over routes and state-channels after a line, a plane and the volume of each route."""
    shares = []
    for k in routes:
        lengths = scan.lengths[k]
        far = influence(
            scan.decay.dt[k : k + 1],
            scan.decay.A[k : k + 1],
            [n - (n == lengths.segment) for n in (lengths.line, lengths.plane, lengths.volume)],
            routes=[scan.placed.core.routes[k]],
            grid=scan.placed.grid,
        )
        shares.append(far.mean[0])
    return torch.stack(shares).mean(0).tolist()


def _eigenvalues(scan: ScanInfo, routes: Sequence[int]) -> str:
    if scan.dynamics is None:
        return "-"
    sets = [scan.placed.core.sets[k] for k in routes]
    return f"{scan.dynamics.smallest[sets].min():.2g}..{scan.dynamics.largest[sets].max():.2g}"


def _lengths(scan: ScanInfo, routes: Sequence[int]) -> str:
    def spread(values: set[int]) -> str:
        return str(min(values)) if len(values) == 1 else f"{min(values)}-{max(values)}"

    lengths = [scan.lengths[k] for k in routes]
    return _slashes(spread({getattr(each, what) for each in lengths}) for what in ("line", "plane", "volume"))


def _route_names(scan: ScanInfo) -> str:
    named = [name for name, routes in ROUTE_SETS.items() if routes == scan.routes]
    return named[0] if named else f"{len(scan.routes)}: {scan.routes[0]} ..."


def _times(values: Iterable[object]) -> str:
    return "x".join(map(str, values))


def _slashes(values: Iterable[object]) -> str:
    return "/".join(map(str, values))


def _tokens(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    """0 only where nothing can be left: the state was cleared."""
    return "0%" if share == 0 else "<0.01%" if share < 1e-4 else f"{100 * share:.2g}%"
