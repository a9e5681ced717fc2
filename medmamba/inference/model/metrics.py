"""Scores of the validation of a training, as nnU-Net's summary.json has them, without cases and paths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .values import mapping, number, optional, text, whole

#: What the scores are.
SOURCE = "validation/summary.json of nnU-Net: the validation cases of each fold, predicted after training"

_PER_FOLD = ("cases", "foreground_mean", "mean")


def reduce_metrics(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Means of every fold that was validated; names of cases and paths of files stay behind.

    Args:
        summaries: fold -> content of its summary.json.

    Returns:
        plain JSON values, or None without a summary. A score that is not finite is None.
    """
    folds = {
        fold: {
            "cases": len(summary.get("metric_per_case", ())),
            "foreground_mean": _scores(summary.get("foreground_mean", {})),
            "mean": {str(label): _scores(scores) for label, scores in summary.get("mean", {}).items()},
        }
        for fold, summary in summaries.items()
    }
    return {"source": SOURCE, "folds": folds} if folds else None


def check_metrics(value: object) -> None:
    """Raise unless this is what :func:`reduce_metrics` returns.

    Raises:
        ModelRefused: MM-MD-009.
    """
    if value is None:
        return
    given = mapping(value, "metrics", ("source", "folds"))
    text(given["source"], "metrics.source")
    for fold, means in mapping(given["folds"], "metrics.folds").items():
        where = f"metrics.folds.{fold}"
        mapping(means, where, _PER_FOLD)
        whole(means["cases"], f"{where}.cases")
        _check_scores(means["foreground_mean"], f"{where}.foreground_mean")
        for label, scores in mapping(means["mean"], f"{where}.mean").items():
            _check_scores(scores, f"{where}.mean.{label}")


def _scores(scores: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        name: float(score) if isinstance(score, int | float) and math.isfinite(score) else None
        for name, score in scores.items()
    }


def _check_scores(value: object, where: str) -> None:
    for name, score in mapping(value, where).items():
        optional(score, f"{where}.{name}", number)
