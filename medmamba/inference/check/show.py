"""Reports as lines of text and of JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from .case_report import CaseReport

_HEAD = ("status", "voxels (x y z)", "spacing mm", "across mm", "axes", "values")
_WIDTHS = (8, 15, 18, 15, 5, 0)


def json_line(report: CaseReport) -> str:
    """One JSON object: the fields of :class:`CaseReport`, with its status."""
    content = asdict(report)
    return json.dumps({"case": content.pop("case"), "status": report.status, **content}, allow_nan=False)


def table_head(width: int) -> str:
    """The first line of the table; ``width`` is that of the longest name of a case."""
    return _line("case", _HEAD, width)


def table_lines(report: CaseReport, width: int) -> list[str]:
    """One line with the facts of a case, and one more for each finding. Sizes are in the order x, y, z."""
    columns = [report.status, *[""] * 5]
    if report.shape:
        columns[1] = " ".join(map(str, report.shape[::-1]))
        columns[2] = " ".join(f"{size:.4g}" for size in report.spacing_mm[::-1])
        columns[3] = " ".join(f"{size:.0f}" for size in report.extent_mm[::-1])
        columns[4] = report.axes
        columns[5] = ", ".join(f"{channel.low:g} to {channel.high:g}" for channel in report.channels)
    lines = [_line(printable(report.case), columns, width)]
    for finding in report.findings:
        where = f"{printable(finding.file)}: " if len(report.files) > 1 and finding.file else ""
        lines.append(f"    {finding.id} {finding.code}: {where}{printable(finding.text)}")
    return lines


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


def _line(name: str, columns: Sequence[str], width: int) -> str:
    cells = [name.ljust(width), *(text.ljust(size) for text, size in zip(columns, _WIDTHS, strict=True))]
    return "  ".join(cells).rstrip()


def printable(text: str) -> str:
    """Text of any file name, without what a terminal would obey or cannot print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
