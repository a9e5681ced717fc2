"""The Spatial-Mamba core against loops over tokens and taps in float64, and against its published defects."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medmamba.mixers import SpatialCore
from medmamba.mixers.spatial import StateFusion


def make(width: int = 3, *, routes=("dhw",), **options) -> SpatialCore:
    torch.manual_seed(0)
    core = SpatialCore(width, d_state=16, dt_rank=2, routes=list(routes), **options).double()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return core


def tokens(grid, width: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, math.prod(grid), width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def states_by_hand(core: SpatialCore, u: torch.Tensor, grid, mask: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(u)
    for k, route in enumerate(core.routes):
        for b in range(len(u)):
            h = u.new_zeros(u.shape[-1])
            for token in route.order(grid).tolist():
                if not mask[b, token]:
                    continue
                *r, B = core.state_proj[k] @ u[b, token]
                dt = F.softplus(core.dt_proj[k] @ torch.stack(r) + core.dt_bias[k])
                h = torch.exp(-dt * torch.exp(core.A_log[k, :, 0])) * h + dt * u[b, token] * B
                result[b, token] += h
    return result


def fused_by_hand(fusion: StateFusion, h: torch.Tensor, grid) -> torch.Tensor:
    """Every tap of every convolution; a place beyond the border is the nearest one within."""
    result = torch.zeros_like(h)
    for module in fusion.convs:
        weight = module.weight.view(h.shape[-1], *(1,) * (5 - module.weight.dim()), *module.weight.shape[2:])
        dilation = (1,) * (3 - len(module.dilation)) + tuple(module.dilation)
        for token in range(h.shape[1]):
            place = [int(p) for p in torch.unravel_index(torch.tensor(token), grid)]
            for tap in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape[1:])).reshape(-1, 3).tolist():
                other = [
                    min(max(p + (t - size // 2) * d, 0), n - 1)
                    for p, t, size, d, n in zip(place, tap, weight.shape[1:], dilation, grid, strict=True)
                ]
                index = (other[0] * grid[1] + other[1]) * grid[2] + other[2]
                result[:, token] += weight[:, tap[0], tap[1], tap[2]] * h[:, index]
    return result


@pytest.mark.parametrize(
    ("grid", "kernel_size"),
    [((1, 1, 1), (3, 3, 3)), ((3, 2, 5), (3, 3, 3)), ((3, 4, 1), (1, 3, 3)), ((1, 5, 2), (3, 5))],
    ids=str,
)
@pytest.mark.parametrize("routes", [("dhw",), ("hwd", "dhw:reverse")], ids=" ".join)
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_recurrence_the_taps_and_the_reading(grid, kernel_size, routes, masked):
    core = make(kernel_size=kernel_size, routes=routes)
    u = tokens(grid)
    mask = torch.ones(u.shape[:2]).bool()
    if masked:
        mask = torch.rand(u.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
    h = fused_by_hand(core.state_fusion, states_by_hand(core, u, grid, mask), grid)
    expected = (h * (u @ core.C_proj.T) + core.D * u) * mask.unsqueeze(-1)
    torch.testing.assert_close(core(u, grid, mask=mask if masked else None), expected, rtol=1e-10, atol=1e-10)


def test_fusion_starts_as_a_mean_and_keeps_a_constant_up_to_the_border():
    fusion = StateFusion(4, (3, 3, 3), dilations=(1, 3, 5), spacing=None)
    assert all(torch.all(conv.weight == conv.weight.flatten()[0]) for conv in fusion.convs)
    torch.testing.assert_close(fusion(torch.full((1, 30, 4), 2.5), (2, 3, 5)), torch.full((1, 30, 4), 2.5))
    assert fusion.convs[0].weight.flatten()[0].item() == pytest.approx(1 / 81)
    flat = StateFusion(4, (1, 3, 3), dilations=(1, 3, 5), spacing=None)
    assert flat.convs[0].weight.flatten()[0].item() == pytest.approx(1 / 27)


@pytest.mark.parametrize(
    ("kernel_size", "spacing", "dilations"),
    [
        ((3, 3, 3), None, [(1, 1, 1), (3, 3, 3), (5, 5, 5)]),
        ((3, 3, 3), (2.5, 1, 1), [(1, 1, 1), (1, 3, 3), (2, 5, 5)]),
        ((3, 3, 3), (0.7, 1.4, 0.7), [(1, 1, 1), (3, 2, 3), (5, 2, 5)]),
        ((1, 3, 3), (5, 1, 1), [(1, 1, 1), (1, 3, 3), (1, 5, 5)]),
        ((3, 3), (1, 9), [(1, 1), (3, 1), (5, 1)]),
    ],
    ids=str,
)
def test_dilations_are_smaller_along_coarser_axes(kernel_size, spacing, dilations):
    core = make(kernel_size=kernel_size, spacing=spacing)
    assert [conv.dilation for conv in core.state_fusion.convs] == dilations
    assert all(conv.kernel_size == tuple(min(k, 3) for k in kernel_size) for conv in core.state_fusion.convs)


def test_the_unit_of_the_spacing_does_not_matter():
    one, other = (make(spacing=[s * unit for s in (3, 1, 1)]) for unit in (1, 0.1))
    assert [c.dilation for c in one.state_fusion.convs] == [c.dilation for c in other.state_fusion.convs]


def test_evaluation_after_training_uses_the_current_weights():
    """The published code merges its kernels at the first evaluation and keeps the merged one from then on."""
    core, u = make(), tokens((3, 4, 5))
    before = core.eval()(u, (3, 4, 5))
    core.train()
    optimizer = torch.optim.SGD(core.state_fusion.parameters(), lr=1.0)
    core(u, (3, 4, 5)).square().mean().backward()
    optimizer.step()
    trained = core(u, (3, 4, 5))
    after = core.eval()(u, (3, 4, 5))
    assert torch.equal(after, trained)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_what_double_precision_gives(dtype):
    core, u = make(routes=("dhw", "dhw:reverse")).to(dtype), tokens((3, 4, 5)).to(dtype)
    y = core(u, (3, 4, 5))
    expected = core.double()(u.double(), (3, 4, 5))
    assert y.dtype == dtype
    assert (y - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


def test_a_state_reaches_as_far_as_the_largest_dilation():
    core = make(1)
    h = torch.zeros(1, 13**3, 1, dtype=torch.float64)
    h[0, 6 * 169 + 6 * 13 + 6] = 1
    seen = core.state_fusion(h, (13, 13, 13)).view(13, 13, 13).nonzero() - 6
    assert sorted(set(seen.flatten().tolist())) == [-5, -3, -1, 0, 1, 3, 5]
    assert len(seen) == 1 + 3 * 26


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": (1, 1)}, "spacing must be 3 positive numbers"),
        ({"spacing": (1, 0, 1)}, "spacing must be 3 positive numbers"),
        ({"dilations": ()}, "dilations must be"),
        ({"dilations": (0, 1)}, "dilations must be"),
    ],
    ids=str,
)
def test_impossible_neighbourhoods_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
