"""Attention against loops over heads, queries and keys in float64."""

from __future__ import annotations

import math

import pytest
import torch

from medmamba.mixers import AttentionCore

SCAN = {"d_state": 4, "dt_rank": 2, "routes": "raster6"}
GRID = (2, 1, 5)


def make(width: int = 6, **options) -> AttentionCore:
    torch.manual_seed(0)
    core = AttentionCore(width, **SCAN, **options).double()
    with torch.no_grad():
        core.D.add_(torch.randn_like(core.D))
        core.qkv.weight.mul_(3)  # away from equal weights for all tokens
    return core


def by_loops(core: AttentionCore, u: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """One sample (L, E); only tokens with ``seen`` (L,) are queries and keys."""
    length, width = u.shape
    size = width // core.heads
    wq, wk, wv = core.qkv.weight.view(3, core.heads, size, width)
    y = torch.zeros_like(u)
    for i in seen.nonzero().flatten():
        parts = []
        for q, k, v in zip(wq, wk, wv, strict=True):
            weights = [torch.exp((q @ u[i]) @ (k @ u[j]) / math.sqrt(size)) for j in range(length) if seen[j]]
            values = [v @ u[j] for j in range(length) if seen[j]]
            parts.append(sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights))
        y[i] = torch.cat(parts) + core.D * u[i]
    return y


@pytest.mark.parametrize("shown", [None, 0.5], ids=["all tokens", "masked"])
@pytest.mark.parametrize("head_width", [2, 3, 6])
def test_it_is_softmax_attention_per_head(head_width, shown):
    core = make(head_width=head_width)
    assert core.heads == 6 // head_width
    u = torch.randn(2, 10, 6, dtype=torch.float64, requires_grad=True)
    mask = None if shown is None else torch.rand(2, 10) < shown
    seen = torch.ones(2, 10, dtype=torch.bool) if mask is None else mask
    y = core(u, GRID, mask=mask)
    expected = torch.stack([by_loops(core, *sample) for sample in zip(u, seen, strict=True)])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y)
    gradients = [torch.autograd.grad((y * weights).sum(), [u, *core.parameters()]) for y in (y, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_masking_is_cutting_out():
    core = make()
    u = torch.randn(1, 10, 6, dtype=torch.float64)
    mask = torch.rand(1, 10) < 0.5
    alone = core(u[mask].unsqueeze(0), (1, 1, int(mask.sum())))
    torch.testing.assert_close(core(u, GRID, mask=mask)[mask], alone[0])


def test_the_order_of_tokens_does_not_matter():
    core = make()
    u = torch.randn(1, 10, 6, dtype=torch.float64)
    order = torch.randperm(10)
    torch.testing.assert_close(core(u[:, order], GRID), core(u, GRID)[:, order])


@pytest.mark.parametrize(
    ("width", "head_width", "heads"), [(64, 32, 2), (80, 32, 2), (97, 32, 1), (6, 32, 1), (96, 24, 4), (90, 16, 5)]
)
def test_heads_share_the_channels_equally(width, head_width, heads):
    assert AttentionCore(width, **SCAN, head_width=head_width).heads == heads


def test_more_tokens_than_the_budget_are_refused_with_what_to_do():
    core = AttentionCore(4, **SCAN, max_tokens=8)
    assert core(torch.randn(1, 8, 4), (2, 2, 2)).shape == (1, 8, 4)
    message = r"attention over 12 tokens \(3x2x2\) is above max_tokens=8; use it at deeper stages"
    with pytest.raises(ValueError, match=message):
        core(torch.randn(1, 12, 4), (3, 2, 2))
    with pytest.raises(ValueError, match=r"4097 tokens .* max_tokens=4096"):
        AttentionCore(4, **SCAN)(torch.empty(1, 4097, 4), (1, 17, 241))


@pytest.mark.parametrize("options", [{"head_width": 0}, {"max_tokens": 0}], ids=str)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match="head_width and max_tokens must be 1 or more"):
        AttentionCore(4, **SCAN, **options)
