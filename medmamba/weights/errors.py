"""The error of this room."""

from __future__ import annotations


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit. One line: what is wrong, where, and what to do."""
