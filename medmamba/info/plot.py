"""Influence against distance, drawn: one panel per grid, one curve per scan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from medmamba.command import CommandError
from medmamba.diagnostics import influence
from medmamba.info.report import ScanInfo

_POINTS = 80
_COLUMNS = 2


def draw(scans: Sequence[ScanInfo], title: str, path: Path) -> None:
    """Write a picture: mean share of a token's contribution over its state-channels and routes, against distance.

    The band goes from the 10th to the 90th percentile of the state-channels. Vertical marks: line, plane and volume of
    the first route.

    Args:
        scans: those of one network.
        title: above the panels.
        path: of the picture; its ending chooses the format.

    Raises:
        CommandError: a format that matplotlib does not know, or a file that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[int, int, int], list[ScanInfo]] = {}
    for scan in scans:
        panels.setdefault(scan.placed.grid, []).append(scan)
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.5 * columns, 3.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (grid, members) in zip(axes, panels.items(), strict=False):
        _panel(axis, grid, members)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=9)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be written ({error}); use a name that ends in .png") from error


def _panel(axis, grid: tuple[int, int, int], scans: Sequence[ScanInfo]) -> None:  # type: ignore[no-untyped-def]
    lengths = scans[0].lengths[0]
    far = max(lengths.volume - 1, 2)
    distances = torch.logspace(0, math.log10(far), _POINTS, dtype=torch.float64).round().long().unique()
    for scan in scans:
        found = influence(scan.decay.dt, scan.decay.A, distances, routes=scan.placed.core.routes, grid=scan.placed.grid)
        (curve,) = axis.plot(distances, found.mean.mean(0), label=scan.placed.name, linewidth=1.2)
        low, _, high = found.quantiles.mean(0).unbind(-1)
        axis.fill_between(distances, low, high, color=curve.get_color(), alpha=0.1, linewidth=0)
    marks: dict[int, list[str]] = {}
    for name in ("line", "plane", "volume"):
        marks.setdefault(getattr(lengths, name), []).append(name)
    for tokens, names in marks.items():
        axis.axvline(tokens, color="0.4", linestyle=":", linewidth=1)
        axis.text(tokens, 0.99, f"{', '.join(names)} ", rotation=90, ha="right", va="top", fontsize=7, color="0.3")
    axis.set(xscale="log", ylim=(0, 1), xlabel="distance along the route, tokens", ylabel="share that is left")
    axis.set_title(f"grid {'x'.join(map(str, grid))}", fontsize=9)
    axis.legend(fontsize=6, loc="lower left" if lengths.volume < 500 else "center right")
