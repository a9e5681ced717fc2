"""Whether a scan draws its tokens together or drives them apart, from its weights alone.

With the input-dependent projections B = S_B u and C = S_C u of a scan, S_B and S_C in R^(N x E), the symmetric part of
S_C^T S_B decides, in a one-dimensional analysis of a stack of scans without norms, gates and convolutions: where it is
negative all tokens tend to 0, where it is positive they grow. Real networks have norms and few layers, so this is
something to watch during a training and no criterion.

As many eigenvalues are negative as positive, N each, whenever the rows of S_B and S_C are linearly independent
(Sylvester's law of inertia; it takes E >= 2N). Their number therefore says nothing: what changes is how large they are.

Source: Vo, Pham, Tong & Nguyen, "Demystifying the Token Dynamics of Deep Selective State Space Models", 2024,
arXiv:2410.03292.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-300


@dataclass(frozen=True)
class TokenDynamics:
    """Eigenvalues of the symmetric part of S_C^T S_B, which has the rank 2N at most.

    Attributes:
        eigenvalues: (S, min(2N, E)) in rising order, float64, for every set of weights (with the default parameters of
            a scan: for every route); the other E - 2N are 0.
        width: E.
    """

    eigenvalues: Tensor
    width: int

    @property
    def smallest(self) -> Tensor:
        """(S,) of all E eigenvalues."""
        return self._with_zero(self.eigenvalues[:, 0]).amin(0)

    @property
    def largest(self) -> Tensor:
        """(S,) of all E eigenvalues."""
        return self._with_zero(self.eigenvalues[:, -1]).amax(0)

    @property
    def negative(self) -> Tensor:
        """(S,) share of the negative ones in the sum of magnitudes: 0 if none is negative, 1 if none is positive."""
        return self.eigenvalues.clamp_max(0).sum(1) / -self.eigenvalues.abs().sum(1).clamp_min(_TINY)

    def _with_zero(self, values: Tensor) -> Tensor:
        is_whole = self.eigenvalues.shape[1] == self.width
        return values.unsqueeze(0) if is_whole else torch.stack([values, torch.zeros_like(values)])


def dynamics_eigenvalues(B: Tensor, C: Tensor) -> Tensor:
    """The eigenvalues of (C^T B + B^T C) / 2 that need not be 0.

    With (B; C)^T = Q R and J the exchange of both halves they are those of R J R^T / 2, of 2N rows instead of E.

    Args:
        B: (..., N, E), any float dtype; computed in float64.
        C: (..., N, E).

    Returns:
        (..., min(2N, E)) in rising order, float64.

    Raises:
        ValueError: matrices of different shapes.
    """
    if B.shape != C.shape:
        raise ValueError(f"B and C must have the same shape (..., N, E), got {tuple(B.shape)} and {tuple(C.shape)}")
    B, C = B.double(), C.double()
    R = torch.linalg.qr(torch.cat([B, C], dim=-2).mT).R
    R_B, R_C = R.chunk(2, dim=-1)
    product = R_C @ R_B.mT
    return torch.linalg.eigvalsh((product + product.mT) / 2)


def token_dynamics(state_dict: Mapping[str, Tensor]) -> dict[str, TokenDynamics]:
    """Token dynamics of every scan in a state dict whose B and C depend on the input, by the name of its module.

    These are :class:`medmamba.mixers.ScanCore` and :class:`medmamba.mixers.SSDCore`: their ``x_proj`` (S, R + 2N, E)
    holds the rows of dt, B and C. A state dict without such scans gives an empty dict.
    """
    found = {}
    for key, value in state_dict.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "x_proj":
            prefix = key.removesuffix("x_proj")
            # One decay rate per state (S, E, N), or one per head (S, H), of which each has a row of dt.
            A_log = state_dict[f"{prefix}A_log"]
            states = A_log.shape[2] if A_log.dim() == 3 else (value.shape[1] - A_log.shape[1]) // 2
            B, C = value.detach().cpu()[:, -2 * states :].chunk(2, dim=1)
            found[name] = TokenDynamics(dynamics_eigenvalues(B, C), value.shape[2])
    return found
