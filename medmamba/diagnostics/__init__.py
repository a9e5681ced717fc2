"""What a network remembers and what it costs. Needs torch only.

decay.py       how much of a token's contribution survives n steps (pure functions of dt and A)
dynamics.py    whether a scan draws its tokens together (eigenvalues of its projections B and C)
scans.py       the dt and A of a network, of a state dict, or as measured on an input
footprint.py   what a training iteration keeps in memory, counted without data
memory.py      peak memory of a training, from the footprint and fitted coefficients (memory_model.json)
operations.py  multiply-accumulate operations, and the share of the scans
"""

from __future__ import annotations

from .decay import Influence, influence, memory_tokens, surviving_share
from .dynamics import TokenDynamics, dynamics_eigenvalues, token_dynamics
from .footprint import Footprint, footprint
from .memory import GB, MemoryModel
from .operations import Operations, operations
from .scans import StepSizes, measure_step_sizes, step_sizes

__all__ = [
    "GB",
    "Footprint",
    "Influence",
    "MemoryModel",
    "Operations",
    "StepSizes",
    "TokenDynamics",
    "dynamics_eigenvalues",
    "footprint",
    "influence",
    "measure_step_sizes",
    "memory_tokens",
    "operations",
    "step_sizes",
    "surviving_share",
    "token_dynamics",
]
