"""The HSM-SSD core against a dense definition in float64, its masked softmax, and a parameter that does nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medmamba.mixers import HiddenStateMixerCore
from medmamba.mixers.hsm_ssd import _shares


def make(width: int = 6, *, d_state: int = 3, **options) -> HiddenStateMixerCore:
    torch.manual_seed(0)
    return HiddenStateMixerCore(width, d_state=d_state, dt_rank=1, routes="raster6", **options).double()


def tokens(grid, width: int = 6, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, math.prod(grid), width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(core: HiddenStateMixerCore, u: torch.Tensor, grid, mask: torch.Tensor | None) -> torch.Tensor:
    mask = torch.ones(u.shape[:2]).bool() if mask is None else mask
    result = torch.zeros_like(u)
    weight, axes = core.local.conv.weight, core.local.axes
    convolve = {2: F.conv2d, 3: F.conv3d}[axes]
    for b in range(len(u)):
        shown = mask[b].nonzero().flatten()
        volume = (core.proj.weight @ (u[b] * mask[b].unsqueeze(-1)).T).reshape(1, -1, *grid[-axes:]).contiguous()
        padding = [size // 2 for size in weight.shape[2:]]
        B, C, dt = convolve(volume, weight, padding=padding, groups=len(weight)).flatten(2)[0].chunk(3)
        for n in range(core.d_state):
            e = torch.exp(dt[n, shown])
            H = ((e / e.sum() * B[n, shown]).unsqueeze(-1) * u[b, shown]).sum(0)
            h, g = (core.in_proj.weight @ H).chunk(2)
            mixed = core.out_proj.weight @ (h * g * torch.sigmoid(g) + (0 if core.D is None else core.D * h))
            result[b, shown] += torch.outer(C[n, shown], mixed)
    return result


@pytest.mark.parametrize(
    ("grid", "kernel_size"),
    [((1, 1, 1), (3, 3, 3)), ((3, 2, 5), (3, 3, 3)), ((3, 4, 1), (1, 3, 3)), ((1, 5, 2), (3, 5))],
    ids=str,
)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_definition(grid, kernel_size, skip, masked):
    core = make(kernel_size=kernel_size, skip=skip)
    u = tokens(grid)
    mask = None
    if masked:
        mask = torch.rand(u.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
        mask[:, 0] = True
    torch.testing.assert_close(core(u, grid, mask=mask), by_hand(core, u, grid, mask), rtol=1e-10, atol=1e-10)
    assert ("D" in core.state_dict()) == skip


def test_the_published_decay_would_do_nothing():
    """It is added to dt in front of the softmax over tokens, one number per latent."""
    dt = torch.randn(2, 30, 3, dtype=torch.float64)
    torch.testing.assert_close(_shares(dt + torch.randn(3).double(), None), _shares(dt, None), rtol=1e-12, atol=1e-15)


def test_shares_are_those_of_the_visible_tokens_alone():
    dt = 50 * torch.randn(2, 30, 3, dtype=torch.float64)
    mask = torch.rand(2, 30) < 0.5
    shares = _shares(dt, mask)
    for b in range(2):
        torch.testing.assert_close(shares[b, mask[b]], dt[b, mask[b]].softmax(0), rtol=1e-12, atol=1e-300)
        assert not shares[b, ~mask[b]].any()


def test_a_sample_without_tokens_is_zero_with_a_gradient_of_zero():
    core, u = make(), tokens((2, 3, 3)).requires_grad_()
    mask = torch.zeros(2, 18).bool()
    mask[0] = True
    y = core(u, (2, 3, 3), mask=mask)
    assert not y[1].any()
    y.square().sum().backward()
    assert u.grad.isfinite().all()
    assert not u.grad[1].any()


def test_the_magnitude_does_not_depend_on_the_number_of_tokens():
    torch.manual_seed(0)
    core = HiddenStateMixerCore(16, d_state=16, dt_rank=1, routes="raster6")
    sizes = []
    with torch.no_grad():
        for grid in ((4, 7, 7), (12, 12, 12), (48, 48, 48)):  # from 196 tokens to 564 times as many
            sizes.append(core(tokens(grid, 16, batch=1).float(), grid).square().mean().sqrt().item())
    assert max(sizes) / min(sizes) < 2  # fewer border voxels, less noise of the mean


def test_half_precision_holds_a_large_volume():
    core = make().to(torch.float16)
    u = 4 + tokens((24, 24, 24), batch=1)
    y = core(u.half(), (24, 24, 24))
    assert y.dtype == torch.float16
    expected = core.double()(u, (24, 24, 24))
    assert (y - expected).square().mean().sqrt() < 0.01 * expected.square().mean().sqrt()
