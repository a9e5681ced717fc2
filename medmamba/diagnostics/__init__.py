"""What a scan remembers: influence against distance, initially, for a checkpoint, or measured. Needs torch only.

decay.py       how much of a token's contribution survives n steps (pure functions of dt and A)
scans.py       the dt and A of a network, of a state dict, or as measured on an input
"""

from __future__ import annotations

from .decay import Influence, influence, memory_tokens, surviving_share
from .scans import StepSizes, measure_step_sizes, step_sizes

__all__ = [
    "Influence",
    "StepSizes",
    "influence",
    "measure_step_sizes",
    "memory_tokens",
    "step_sizes",
    "surviving_share",
]
