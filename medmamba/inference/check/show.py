"""Reports as lines of text and of JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from medmamba.command import printable

from .case_report import CaseReport
from .cost import Cost, Totals
from .finding import Finding

_HEAD = ("status", "voxels (x y z)", "spacing mm", "across mm", "axes")
_WIDTHS = (8, 15, 18, 15, 5)
_COST_HEAD = ("time", "memory")
_COST_WIDTHS = (9, 8)


def json_line(report: CaseReport) -> str:
    """One JSON object: the fields of :class:`CaseReport`, with its status."""
    content = asdict(report)
    return json.dumps({"case": content.pop("case"), "status": report.status, **content}, allow_nan=False)


def json_totals(totals: Totals) -> str:
    """One JSON object with what all cases take together. It has a ``record``, "total", and no ``case``."""
    return json.dumps({"record": "total", **asdict(totals)}, allow_nan=False)


@dataclass(frozen=True)
class Table:
    """Reports as lines of a table.

    Attributes:
        width: of the longest name of a case; see :func:`width_of`.
        costs: whether there are columns for what prediction takes.
    """

    width: int
    costs: bool = False

    def head(self) -> str:
        """Its first line."""
        return self._line("case", [*_HEAD, *_COST_HEAD * self.costs, "values"])

    def lines(self, report: CaseReport) -> list[str]:
        """One line with the facts of a case, and one more for each finding. Sizes are in the order x, y, z."""
        columns = [report.status, *[""] * 4]
        if report.shape:
            columns[1] = " ".join(map(str, report.shape[::-1]))
            columns[2] = " ".join(f"{size:.4g}" for size in report.spacing_mm[::-1])
            columns[3] = " ".join(f"{size:.0f}" for size in report.extent_mm[::-1])
            columns[4] = report.axes
        if self.costs:
            columns += _cost_columns(report.cost)
        columns.append(", ".join(f"{channel.low:g} to {channel.high:g}" for channel in report.channels))
        return [self._line(printable(report.case), columns), *(_finding_line(report, f) for f in report.findings)]

    def _line(self, name: str, columns: Sequence[str]) -> str:
        widths = (*_WIDTHS, *_COST_WIDTHS * self.costs, 0)
        cells = [name.ljust(self.width), *(text.ljust(size) for text, size in zip(columns, widths, strict=True))]
        return "  ".join(cells).rstrip()


def totals_lines(totals: Totals) -> list[str]:
    """What all cases take together, in words."""
    said = f"predicting {totals.predictable} of {totals.cases}: up to {totals.passes} passes of the network"
    if totals.seconds is not None:
        said += f", about {duration_text(totals.seconds)} at {totals.seconds_per_pass:.3g} s each as timed here"
        said += f" with {totals.threads} {'thread' if totals.threads == 1 else 'threads'}"
    said += f" ({totals.passes_per_tile} per tile); "
    if totals.peak_ram_mb is not None:
        usable = "" if totals.usable_ram_mb is None else f" of {size_text(totals.usable_ram_mb << 20)}"
        said += f"up to {size_text(totals.peak_ram_mb << 20)}{usable} of memory, "
    said += f"up to {size_text(totals.output_bytes)} of disk"
    said += "" if totals.free_bytes is None else f", {size_text(totals.free_bytes)} are free"
    return [said, *(f"{finding.id} {finding.code}: {finding.text}" for finding in totals.findings)]


def summary(counts: Counter[str]) -> str:
    """E.g. "200 cases: 193 ok, 2 truncated, 1 not-3d"; ``counts`` of :func:`outcome`."""
    total = sum(counts.values())
    usable = [f"{counts[name]} {name}" for name in ("ok", "noted") if counts[name]]
    refused = [f"{number} {name}" for name, number in sorted(counts.items()) if name not in ("ok", "noted")]
    return f"{total} {'case' if total == 1 else 'cases'}: {', '.join(usable + refused)}"


def outcome(report: CaseReport) -> str:
    """ "ok", "noted", or the code of the first refusal."""
    return next((finding.code for finding in report.findings if finding.refuses), report.status)


def width_of(names: Iterable[str]) -> int:
    """Width of the column of names."""
    return max([4, *(len(printable(name)) for name in names)])


def duration_text(seconds: float) -> str:
    """Of a stretch of time, in the unit that suits it: "0.4 s", "4.1 min", "13.4 h"."""
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def size_text(size_bytes: float) -> str:
    """Of memory or disk, in powers of 1024: "340 MB", "9.1 GB"."""
    mb = size_bytes / 2**20
    return f"{mb:.2g} MB" if mb < 10 else f"{mb:.0f} MB" if mb < 1000 else f"{mb / 1024:.1f} GB"


def _cost_columns(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["", ""]
    return [
        "" if cost.seconds is None else duration_text(cost.seconds),
        "" if cost.peak_ram_mb is None else size_text(cost.peak_ram_mb << 20),
    ]


def _finding_line(report: CaseReport, finding: Finding) -> str:
    where = f"{printable(finding.file)}: " if len(report.files) > 1 and finding.file else ""
    return f"    {finding.id} {finding.code}: {where}{printable(finding.text)}"
