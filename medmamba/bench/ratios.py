"""What a run says in the end: every peer against our best backend, case by case and pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Time and peak memory of peers over those of the fastest backend, from rows of ``scan.run`` or of its CSV.

    Yields:
        case, pass, best (a backend), and ``peers``: name -> (ratio of times, ratio of memory or None), or the note of
        a peer that was not run. Cases without a peer or without a backend are left out.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["pass"]), []).append(row)
    for (case, pass_name), group in groups.items():
        backends = [row for row in group if row["kind"] == "backend"]
        peers = [row for row in group if row["kind"] == "peer"]
        if not backends or not peers:
            continue
        best = min(backends, key=lambda row: float(row["p50_ms"]))
        yield {
            "case": case,
            "pass": pass_name,
            "best": best["backend"],
            "peers": {row["backend"]: row["note"] or _against(row, best) for row in peers},
        }


def _against(row: dict[str, Any], best: dict[str, Any]) -> tuple[float, float | None]:
    memory = None
    if row["peak_mib"] != "" and best["peak_mib"] != "" and float(best["peak_mib"]) > 0:
        memory = float(row["peak_mib"]) / float(best["peak_mib"])
    return float(row["p50_ms"]) / float(best["p50_ms"]), memory


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table for people: ``time x, memory x`` of every peer, or a dash where it was not run."""
    table = list(ratios(rows))
    names = list(dict.fromkeys(name for entry in table for name in entry["peers"]))
    if not names:
        return
    yield "peers against our best backend: time x, peak memory x"
    yield f"{'case':<18} {'pass':<9} {'best':<8}" + "".join(f" {name:>16}" for name in names)
    for entry in table:
        cells = (_cell(entry["peers"].get(name)) for name in names)
        yield f"{entry['case']:<18} {entry['pass']:<9} {entry['best']:<8}" + "".join(f" {cell:>16}" for cell in cells)


def _cell(value: str | tuple[float, float | None] | None) -> str:
    if value is None or isinstance(value, str):
        return "-"
    time, memory = value
    return f"{time:.3g}, " + ("?" if memory is None else f"{memory:.3g}")
