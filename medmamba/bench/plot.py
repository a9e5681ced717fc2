"""The plot of the bench: time per element and peak memory over the length of the sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from medmamba.bench.cases import sweep_cases
from medmamba.command import CommandError

#: Okabe and Ito's colours, which people with colour blindness tell apart. One per name, whatever else is plotted.
COLOURS = {
    "native": "#D55E00",
    "triton": "#CC79A7",
    "torch": "#E69F00",
    "compiled": "#009E73",
    "mambapy": "#56B4E9",
    "mamba_ssm": "#0072B2",
    "published": "#666666",
}
PASSES = ("forward", "training")
UNITS = {"ns_per_element": "ns per token, channel and route", "peak_mib": "peak memory, MiB"}


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write a PNG: one column of panels per number of routes and pass, time above memory.

    Args:
        rows: of ``scan.run`` or of its CSV; those of the length sweep are used.

    Raises:
        CommandError: no row of the sweep among them.
    """
    sweep = {case.name: case for case in sweep_cases()}
    points = [row for row in rows if row["case"] in sweep and row["p50_ms"] != ""]
    if not points:
        raise CommandError("there is nothing to plot: run the cases of the length sweep, e.g. --case 'L '")
    counts = sorted({len(sweep[row["case"]].resolved_routes) for row in points})
    columns = [(count, name) for name in PASSES for count in counts]
    figure = Figure(figsize=(3.1 * len(columns) + 0.6, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for j, (count, name) in enumerate(columns):
        chosen = [r for r in points if r["pass"] == name and len(sweep[r["case"]].resolved_routes) == count]
        axes[0, j].set_title(f"{name}, {count} route{'s' if count > 1 else ''}", fontsize=10, loc="left")
        for i, column in enumerate(UNITS):
            for contender in COLOURS:
                _line(axes[i, j], [r for r in chosen if r["backend"] == contender], column, contender, sweep)
            _tidy(axes[i, j], [sweep[row["case"]].length for row in points])
        axes[1, j].set_xlabel("tokens", fontsize=9)
    for i, unit in enumerate(UNITS.values()):
        axes[i, 0].set_ylabel(unit, fontsize=9)
    handles = {line.get_label(): line for panel in axes.flat for line in panel.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), frameon=False)
    case, row = next(iter(sweep.values())), points[0]
    facts = [f"{case.channels} channels, N {case.state_size}, float32", row.get("processor"), _threads(row)]
    figure.supxlabel(" · ".join(fact for fact in facts if fact), fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(out)


def _threads(row: dict[str, Any]) -> str:
    return "" if row.get("device") == "cuda" else f"{row['threads']} thread{'s' if int(row['threads']) > 1 else ''}"


def _line(axes: Axes, rows: Sequence[dict[str, Any]], column: str, name: str, sweep: dict[str, Any]) -> None:
    # A peak of zero is below what can be seen of a process; a logarithmic axis has no place for it.
    values = sorted((sweep[row["case"]].length, float(row[column])) for row in rows if float(row[column] or 0) > 0)
    if values:
        lengths, heights = zip(*values, strict=True)
        axes.plot(lengths, heights, color=COLOURS[name], label=name, marker="o", markersize=3, linewidth=1.6)


def _tidy(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = math.log2(min(lengths)), math.log2(max(lengths))
    axes.xaxis.set_major_locator(FixedLocator([2.0**e for e in range(math.ceil(low), math.floor(high) + 1, 2)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
