"""A convolution as large as the volume, separable: a matrix product along every axis, and nothing to scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.layers.parameters import exempt_from_decay

from .lag_kernels import FourierKernel, FreeKernel, S4DKernel
from .mask import keep
from .precision import at_least_float32, full_precision, result_dtype

KERNELS: dict[str, type[nn.Module]] = {"fout": FourierKernel, "free": FreeKernel, "s4d": S4DKernel}
# Below this mean energy a kernel counts as 0 and stays 0: nothing is divided by it.
_TINY = 1e-20


class GlobalConvCore(nn.Module):
    """Separable two-sided convolution over the whole volume, without selection: the kernels do not depend on tokens.

    ::

        y = sum_r gain_r * (T_r^D x T_r^H x T_r^W) u + D * u          T^a[i, j] = k^a[i - j]

    per channel; T^a is a Toeplitz matrix of a kernel with 2 S_a - 1 values, generated for the size S_a at hand, so any
    patch runs with the same weights. An axis of size 1 costs nothing. Kernels are global along every axis of the
    image, also where ``kernel_size`` is 1: they are functions of distance and not of neighbours, which a thick axis
    has as well (give its ``spacing``).

    Every kernel is scaled so that T has the Frobenius norm of the identity. White noise of rms 1 so leaves T with a
    mean square of exactly 1 at any size, border included; gain starts at 1/sqrt(2 R) and D at 1/sqrt(2).

    Parameters: ``kernels``, one module per axis; ``gain`` (R, E); ``D`` (E).

    Args:
        width: E.
        d_state, dt_rank, routes, dt_range, fusion: of a scan; ignored.
        kernel_size: of the network's convolutions at this place; says only how many axes an image has.
        kernel: "s4d" (:class:`~medmamba.mixers.lag_kernels.S4DKernel`), "fout"
            (:class:`~medmamba.mixers.lag_kernels.FourierKernel`) or "free"
            (:class:`~medmamba.mixers.lag_kernels.FreeKernel`).
        rank: R, products of one kernel per axis that are summed. One is aligned with the axes.
        axes: of the image, those that the kernels span, 0 for the slowest; default all.
        spacing: of the tokens per axis of the image, in any unit: the lag of an axis counts by its ratio to the finest.
            Default: the same on every axis.
        terms: complex modes of "s4d" and "fout".
        steps: step sizes of "s4d" and "fout" at initialisation, log-uniform in (low, high); their inverse is the
            timescale in tokens of the finest axis.
        band_limit: for "s4d" and "fout", leave out modes above this multiple of an axis' Nyquist frequency.
        length: weights per direction of "free".
        squash: threshold of "free", in standard deviations at initialisation.

    Raises:
        ValueError: an unknown kernel, or an option out of its range.

    Source: Nguyen et al., "S4ND: Modeling Images and Videos as Multidimensional Signals Using State Spaces", 2022,
    arXiv:2210.06583. Changed: matrix products for its FFTs; the norm; backward lags start at 1; A is not learned.
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int,
        dt_rank: int,
        routes: str | Sequence[str],
        kernel_size: Sequence[int] = (3, 3, 3),
        dt_range: Sequence[float] | Sequence[Sequence[float]] | None = None,
        fusion: Callable[[Tensor], Tensor] | None = None,
        kernel: str = "s4d",
        rank: int = 1,
        axes: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
        terms: int = 16,
        steps: Sequence[float] = (0.01, 0.5),
        band_limit: float | None = None,
        length: int = 32,
        squash: float = 0.1,
    ):
        super().__init__()
        _check(kernel, len(kernel_size), spacing, steps, band_limit, squash, rank=rank, terms=terms, length=length)
        own: dict[str, Any] = {"terms": terms, "steps": steps, "band_limit": band_limit}
        if kernel == "free":
            own = {"length": length, "squash": squash}
        spacing = [1.0] * len(kernel_size) if spacing is None else spacing
        self.axes = tuple(range(len(kernel_size))) if axes is None else tuple(sorted(axes))
        if not self.axes or not set(self.axes) <= set(range(len(kernel_size))):
            raise ValueError(f"axes must name some of the {len(kernel_size)} axes of the image, from 0 on, got {axes}")
        self.ndim = len(kernel_size)
        self.kernels = nn.ModuleList(
            KERNELS[kernel](width, rank=rank, ratio=spacing[axis] / min(spacing), **own) for axis in self.axes
        )
        self.gain = exempt_from_decay(nn.Parameter(torch.full((rank, width), 1 / math.sqrt(2 * rank))))
        self.D = exempt_from_decay(nn.Parameter(torch.full((width,), 1 / math.sqrt(2))))

    def axis_kernels(self, grid: Sequence[int]) -> list[Tensor]:
        """The normalised kernels of ``axes``, (R, E, 2 S - 1) each: index S - 1 is lag 0, higher is forward."""
        sizes = grid[-self.ndim :]
        return [unit_energy(two_sided(k(sizes[axis]))) for k, axis in zip(self.kernels, self.axes, strict=True)]

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        """(B, L, E) tokens in the raster order of ``grid`` -> (B, L, E); ``mask``: see :mod:`medmamba.mixers`.

        Computed in float32, or float64 for such input. Answers in the dtype of u, float16 in float32.
        """
        u = keep(u, mask)
        batch, length, width = u.shape
        with full_precision(u):
            tokens = at_least_float32(u)
            # A copy that transposes two axes is several times faster than one that moves the batch as well.
            x = tokens.reshape(batch * length, width).t().contiguous()
            y = self._convolve(x, grid).t().contiguous().view(length, batch, width).transpose(0, 1)
            y = torch.addcmul(y.contiguous(), tokens, self.D)
        return keep(y.to(result_dtype(u)), mask)

    def _convolve(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """(E, B D H W) -> (E, D H W B)."""
        sizes = grid[-self.ndim :]
        kernels = dict(zip(self.axes, self.axis_kernels(grid), strict=True))
        scale: Tensor = self.gain
        for axis in [axis for axis in kernels if sizes[axis] == 1]:
            scale = scale * kernels.pop(axis)[..., 0]
        if not kernels:
            return x.view(len(x), -1, math.prod(sizes)).mT.flatten(1) * scale.sum(0).unsqueeze(-1)
        first = min(kernels)
        kernels[first] = kernels[first] * scale.unsqueeze(-1)
        total: Tensor | None = None
        for r in range(len(scale)):
            y = x
            # Each step takes the last axis and puts it in front. After all of them only the batch has moved.
            for axis in reversed(range(self.ndim)):
                y = y.reshape(len(x), -1, sizes[axis]).mT
                if axis in kernels:
                    y = torch.bmm(toeplitz(kernels[axis][r]).to(x.dtype), y)
            total = y.flatten(1) if total is None else total + y.flatten(1)
        assert total is not None
        return total


def two_sided(k: Tensor) -> Tensor:
    """(..., 2, S) forward and backward values at the lags 0 ... S-1 -> (..., 2 S - 1); backward ones count from 1."""
    forward, backward = k.unbind(-2)
    return torch.cat([backward[..., 1:].flip(-1), forward], dim=-1)


def unit_energy(k: Tensor) -> Tensor:
    """Kernels (..., 2 S - 1) scaled so that their Toeplitz matrix has the Frobenius norm of the identity, sqrt(S)."""
    size = (k.shape[-1] + 1) // 2
    lags = torch.arange(1 - size, size, dtype=k.dtype, device=k.device)
    energy = (k.square() * (1 - lags.abs() / size)).sum(-1, keepdim=True)
    return k * torch.rsqrt(energy.clamp_min(_TINY))


def toeplitz(k: Tensor) -> Tensor:
    """(..., 2 S - 1) -> (..., S, S) with entries k[i - j + S - 1]."""
    size = (k.shape[-1] + 1) // 2
    return k.flip(-1).unfold(-1, size, 1).flip(-2)


def _check(
    kernel: str,
    axes: int,
    spacing: Sequence[float] | None,
    steps: Sequence[float],
    band_limit: float | None,
    squash: float,
    **counts: int,
) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r} of the global convolution; known: {', '.join(sorted(KERNELS))}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} of the global convolution must be 1 or more, got {count}")
    if spacing is not None and not (len(spacing) == axes and all(0 < s < math.inf for s in spacing)):
        raise ValueError(f"spacing must be one positive number for each of the {axes} axes, got {spacing}")
    if not (len(steps) == 2 and 0 < steps[0] <= steps[1] < math.inf):
        raise ValueError(f"steps must be 0 < low <= high, got {steps}")
    if band_limit is not None and (kernel == "free" or not 0 < band_limit < math.inf):
        raise ValueError(
            f"band_limit must be positive, for a kernel of modes (s4d, fout), got {band_limit} for {kernel}"
        )
    if not 0 <= squash < 1:
        raise ValueError(f"squash must be from 0 to below 1 standard deviation, got {squash}")
