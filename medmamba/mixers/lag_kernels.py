"""Kernels of a global convolution along one axis: functions of the lag, sampled at as many lags as the axis needs.

Each module maps a size S to values (R, E, 2, S) in float32 or wider, at the lags 0 ... S-1, forward and backward. The
lag is counted in tokens times ``ratio``, the spacing of the axis over the finest spacing: a thick axis has larger
steps through the same function. Nothing in the parameters depends on S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmamba.layers.parameters import exempt_from_decay

from .precision import at_least_float32


class _Modes(nn.Module):
    """A sum of n complex modes with weights C (R, E, 2, n), stored as pairs of reals, and a step size per channel."""

    def __init__(
        self, width: int, *, rank: int, ratio: float, terms: int, steps: Sequence[float], band_limit: float | None
    ):
        super().__init__()
        low, high = steps
        self.ratio = ratio
        self.band_limit = band_limit
        self.C = exempt_from_decay(nn.Parameter(torch.randn(rank, width, 2, terms, 2) * math.sqrt(0.5)))
        logarithm = torch.empty(rank, width).uniform_(math.log(low), math.log(high))
        self.log_step = exempt_from_decay(nn.Parameter(logarithm))

    def _sample(self, size: int, cycles: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step times lag (R, E, 1, S); angles (R, E, n, S); step (R, E, 1); weights of the modes (R, E, 2, n, 2).

        Mode n turns ``cycles`` * n times per unit of step times lag.
        """
        step = torch.exp(at_least_float32(self.log_step)).unsqueeze(-1) * self.ratio
        lags = torch.arange(size, dtype=step.dtype, device=step.device)
        modes = torch.arange(self.C.shape[3], dtype=step.dtype, device=step.device)
        time = step.unsqueeze(-1) * lags
        per_token = cycles * modes * step
        weights = at_least_float32(self.C)
        if self.band_limit is not None:
            weights = weights * (per_token <= 0.5 * self.band_limit)[:, :, None, :, None]
        return time, 2 * math.pi * cycles * modes.unsqueeze(-1) * time, step, weights


class S4DKernel(_Modes):
    """S4D: decaying modes, ``k(l) = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l)``, ``A_n = -1/2 + i pi n``.

    dt is the step size times ``ratio``. A is fixed; C and the step size are learned.

    Args:
        width: E.
        rank: R.
        ratio: spacing of the axis over the finest spacing.
        terms: n, complex modes (half of the paper's N).
        steps: (low, high); the step sizes are drawn log-uniformly between. A kernel fades over 2 / step tokens.
        band_limit: leave out modes above this multiple of the Nyquist frequency of the axis; None: keep all.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", 2022,
    arXiv:2206.11893 (S4D-Lin, zero-order hold); the limit: Nguyen et al., "S4ND", 2022, arXiv:2210.06583.
    """

    def forward(self, size: int) -> Tensor:
        time, angle, dt, C = self._sample(size, cycles=0.5)
        real, imaginary = -0.5, math.pi * torch.arange(C.shape[3], dtype=dt.dtype, device=dt.device)
        # (exp(dt A) - 1) / A in real numbers, which torch.compile knows better than complex ones.
        x = torch.exp(real * dt) * torch.cos(imaginary * dt) - 1
        y = torch.exp(real * dt) * torch.sin(imaginary * dt)
        square = real**2 + imaginary**2
        b_real, b_imaginary = (x * real + y * imaginary) / square, (y * real - x * imaginary) / square
        b_real, b_imaginary = b_real.unsqueeze(2), b_imaginary.unsqueeze(2)
        c_real, c_imaginary = C.unbind(-1)
        even = (c_real * b_real - c_imaginary * b_imaginary) @ torch.cos(angle)
        odd = (c_real * b_imaginary + c_imaginary * b_real) @ torch.sin(angle)
        return 2 * torch.exp(real * time) * (even - odd)


class FourierKernel(_Modes):
    """A truncated Fourier series: ``k(l) = 2 Re sum_n C_n exp(2 pi i n dt l)`` where dt l <= 1, 0 beyond.

    Args: those of :class:`S4DKernel`; a kernel is 1 / step tokens long on either side.

    Source: Gu et al., "How to Train Your HiPPO", 2022, arXiv:2206.12037 (the truncated Fourier basis, FouT), as a
    kernel, with the same step size for both directions.
    """

    def forward(self, size: int) -> Tensor:
        time, angle, _, C = self._sample(size, cycles=1.0)
        c_real, c_imaginary = C.unbind(-1)
        series = c_real @ torch.cos(angle) - c_imaginary @ torch.sin(angle)
        return 2 * (time <= 1) * series


class FreeKernel(nn.Module):
    """A weight per lag, with small ones set to 0: ``k = relu(|w| - squash) sign(w)``.

    Between the lags of the weights the kernel is interpolated linearly, beyond the last it is 0: an axis shorter than
    ``length`` uses the middle, on a longer one tokens further apart do not see each other here.

    Args:
        width: E.
        rank: R.
        ratio: spacing of the axis over the finest spacing.
        length: weights per direction.
        squash: in units of the initial standard deviation, which is 1. Small against it: what is squashed has no
            gradient (the released class has a default of 50 standard deviations, and with it a kernel that stays 0).

    Source: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", 2023, arXiv:2302.06646.
    """

    def __init__(self, width: int, *, rank: int, ratio: float, length: int, squash: float):
        super().__init__()
        self.ratio = ratio
        self.squash = squash
        self.weight = exempt_from_decay(nn.Parameter(torch.randn(rank, width, 2, length)))

    def forward(self, size: int) -> Tensor:
        weight = at_least_float32(self.weight)
        weight = torch.relu(weight.abs() - self.squash) * weight.sign()
        own = torch.arange(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        lags = torch.arange(size, dtype=weight.dtype, device=weight.device) * self.ratio
        return weight @ (1 - (own.unsqueeze(-1) - lags).abs()).clamp_min(0)
