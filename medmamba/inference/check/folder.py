"""All cases, one after the other, and what only their comparison shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from .case_report import CaseReport, Check, Reading, examine
from .cases import Case
from .finding import Finding


def check_cases(
    cases: Iterable[Case], reading: Reading | None = None, checks: Sequence[Check] = ()
) -> Iterator[CaseReport]:
    """Examine cases in their order; see :func:`examine`.

    A channel with the voxels of an earlier one, of whatever case, gets a note; of all images only hashes are kept.
    """
    seen: dict[str, str] = {}
    for case in cases:
        report = examine(case, reading, checks)
        copies = []
        for channel in report.channels:
            where = f"{channel.file} of case {case.id}"
            first = seen.setdefault(channel.content, where)
            if first is not where:
                copies.append(Finding.of("MM-IO-090", f"the same voxels as in {first}", channel.file))
        yield replace(report, findings=report.findings + tuple(copies))
