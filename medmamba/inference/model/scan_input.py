"""Limits of what the scans of a model read, as model.json holds them."""

from __future__ import annotations

from collections.abc import Sequence

from .values import mapping, number, size, whole, wrong


def check_scan_input(value: object, folds: Sequence[str]) -> None:
    """Raise unless this is None, or ``quantile``, ``cases`` and ``limits``: fold -> path of the scan -> limit.

    Raises:
        ModelRefused: MM-MD-009.
    """
    if value is None:
        return
    given = mapping(value, "scan_input", ("quantile", "cases", "limits"))
    if not 0 < number(given["quantile"], "scan_input.quantile") <= 1:
        wrong("scan_input.quantile", given["quantile"], "a number above 0, at most 1")
    whole(given["cases"], "scan_input.cases", 1)
    for fold, limits in mapping(given["limits"], "scan_input.limits", folds).items():
        for name, limit in mapping(limits, f"scan_input.limits.{fold}").items():
            size(limit, f"scan_input.limits.{fold}.{name}")


def check_names(value: dict[str, dict[str, dict[str, float]]] | None, scans: Sequence[str]) -> None:
    """Raise unless there is a limit for every scan of the network and for nothing else.

    Raises:
        ModelRefused: MM-MD-009.
    """
    for fold, limits in {} if value is None else value["limits"].items():
        mapping(limits, f"scan_input.limits.{fold}", scans)
