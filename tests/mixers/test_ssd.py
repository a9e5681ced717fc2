"""The SSD core against its recurrence in float64, and against the S6 core whose rates are those of heads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medmamba.mixers import GatedFusion, ScanCore, SSDCore, initialise_step_sizes, placed_scans
from medmamba.mixers.ssd import heads_of
from medmamba.networks import create_network
from medmamba_kernels import resolve_routes

STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]


def make(width: int = 6, *, d_state: int = 3, routes="raster6", **options) -> SSDCore:
    torch.manual_seed(0)
    core = SSDCore(width, d_state=d_state, dt_rank=1, routes=routes, **options).double()
    with torch.no_grad():
        core.D.add_(torch.randn_like(core.D))
    return core


def by_hand(core: SSDCore, u: torch.Tensor, grid, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One token after the other, one head after the other. (B, L, E)."""
    per_head = u.shape[-1] // core.heads
    result = torch.zeros_like(u)
    for k, route in enumerate(core.routes):
        order, starts = route.order(grid).tolist(), route.starts(grid).tolist()
        for b in range(u.shape[0]):
            for head in range(core.heads):
                channels = slice(head * per_head, (head + 1) * per_head)
                h = u.new_zeros(per_head, core.d_state)
                for token, is_start in zip(order, starts, strict=True):
                    h = torch.zeros_like(h) if is_start else h
                    if mask is not None and not mask[b, token]:
                        continue
                    r, B, C = (core.x_proj[k] @ u[b, token]).split([core.heads, core.d_state, core.d_state])
                    dt = F.softplus(r[head] + core.dt_bias[k, head])
                    mine = u[b, token, channels]
                    h = torch.exp(-dt * torch.exp(core.A_log[k, head])) * h + dt * torch.outer(mine, B)
                    result[b, token, channels] += h @ C + core.D[k, channels] * mine
    return result


def tokens(grid, width: int = 6, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, math.prod(grid), width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 5), (3, 2, 3)], ids=str)
@pytest.mark.parametrize("head_width", [1, 2, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_recurrence(grid, head_width, masked):
    core = make(head_width=head_width, routes=["dhw", "hwd:reverse", "wdh:reset=line"])
    u = tokens(grid)
    mask = torch.rand(u.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    torch.testing.assert_close(core(u, grid, mask=mask), by_hand(core, u, grid, mask), rtol=1e-10, atol=1e-10)


def test_it_is_the_scan_with_the_rates_of_heads():
    ssd = make(head_width=3)
    scan = ScanCore(6, d_state=3, dt_rank=2, routes="raster6").double()
    with torch.no_grad():  # as many ranks as heads, and every channel of a head the same step
        scan.x_proj.copy_(ssd.x_proj)
        scan.dt_proj.copy_(torch.eye(2).repeat_interleave(3, dim=0).expand_as(scan.dt_proj))
        scan.dt_bias.copy_(ssd.dt_bias.repeat_interleave(3, dim=1))
        scan.A_log.copy_(ssd.A_log.repeat_interleave(3, dim=1).unsqueeze(-1).expand_as(scan.A_log))
        scan.D.copy_(ssd.D)
    u = tokens((2, 3, 5))
    torch.testing.assert_close(ssd(u, (2, 3, 5)), scan(u, (2, 3, 5)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ssd.step_sizes(u).repeat_interleave(3, dim=-1), scan.step_sizes(u))


@pytest.mark.parametrize(
    ("width", "head_width", "heads"), [(64, 16, 4), (6, 16, 1), (96, 64, 2), (7, 3, 7), (12, 5, 3), (1, 1, 1)]
)
def test_heads_are_as_wide_as_asked_or_the_largest_divisor_below(width, head_width, heads):
    assert heads_of(width, head_width) == heads
    assert make(width, head_width=head_width).A_log.shape == (6, heads)


def test_a_head_without_channels_is_refused():
    with pytest.raises(ValueError, match="head_width must be at least 1"):
        make(head_width=0)


def test_rates_and_steps_start_as_in_mamba_2():
    core = make(512, head_width=1)
    assert 1 <= core.A_log.exp().min() < 1.1
    assert 15.9 < core.A_log.exp().max() <= 16
    dt = F.softplus(core.dt_bias)
    assert 0.99e-3 < dt.min() < 1.1e-3
    assert 0.09 < dt.max() < 0.1001


def test_a_fusion_gets_the_routes_apart():
    seen = []

    class Mean(torch.nn.Module):
        def forward(self, y):
            seen.append(y.shape)
            return y.mean(1)

    u = tokens((2, 3, 5))
    torch.testing.assert_close(make(fusion=Mean())(u, (2, 3, 5)) * 6, make()(u, (2, 3, 5)))
    assert seen == [(2, 6, 30, 6)]
    assert make(fusion=GatedFusion(0.0))(u, (2, 3, 5)).isfinite().all()


def test_diagnostics_and_dt_init_see_it_as_a_scan():
    options = {"strides": STRIDES, "base_features": 8, "depths": 1, "d_state": 2, "ssm_mode": "ssd"}
    network = create_network("vmunet", 1, 2, **options)
    scans = placed_scans(network, 1, (16, 32, 16))
    assert len(scans) == sum(isinstance(module, SSDCore) for module in network.modules()) > 0
    before = {key: value.clone() for key, value in network.state_dict().items()}
    initialise_step_sizes(network, {"patch_size": (16, 32, 16)}, input_channels=1)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{scan.name}.dt_bias" for scan in scans}
    assert [len(scan.core.dt_ranges) for scan in scans] == [len(resolve_routes("raster6"))] * len(scans)
