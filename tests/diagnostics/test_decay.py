"""Influence against distance: equal to an impulse sent through the reference scan, and to the published figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import exp1

from medmamba.diagnostics import influence, measure_step_sizes, memory_tokens, step_sizes, surviving_share
from medmamba.mixers import ScanCore, placed_scans
from medmamba.networks import create_network
from medmamba_kernels import parse_route, selective_scan_reference

GRID = (2, 3, 4)
LENGTH = math.prod(GRID)
ROUTES = ("dhw", "hwd:reverse", "dwh:snake:reset=plane", "dhw:reset=line", "whd:step=1x2x3:reset=phase", "hdw:hilbert")


def random_decay(routes: int, channels: int = 3, states: int = 2, batch: int = 2):
    generator = torch.Generator().manual_seed(0)
    dt = torch.rand(batch, LENGTH, routes, channels, generator=generator, dtype=torch.float64) * 0.3
    A = -torch.rand(routes, channels, states, generator=generator, dtype=torch.float64) * 2 - 0.1
    return dt, A


def share_by_impulses(dt, A, route: str, distance: int):
    """(c, N) mean share over all pairs: an impulse per token through the reference scan, read state by state."""
    batch, length, channels = dt.shape
    states = A.shape[-1]
    path, order = parse_route(route), parse_route(route).order(GRID)
    segment = path.starts(GRID).cumsum(0)
    shares = []
    for step in range(length - distance):
        if segment[step] != segment[step + distance]:
            continue
        x = torch.zeros(batch, length, channels, dtype=torch.float64)
        x[:, order[step]] = 1
        B = torch.ones(batch, length, 1, states, dtype=torch.float64)
        read = []
        for j in range(states):
            C = torch.zeros_like(B)
            C[..., j] = 1
            y, _ = selective_scan_reference(
                x, dt.unsqueeze(2), A.unsqueeze(0), B, C, routes=[route], grid=GRID, dt_softplus=False
            )
            read.append(y[:, order[step + distance]] / y[:, order[step]])
        shares.append(torch.stack(read, dim=-1))
    return torch.stack(shares).mean((0, 1)) if shares else torch.zeros(channels, states, dtype=torch.float64)


@pytest.mark.parametrize("distance", [0, 1, 3, 11, 23])
@pytest.mark.parametrize("route", ROUTES)
def test_it_is_what_an_impulse_leaves_in_the_reference_scan(route, distance):
    dt, A = random_decay(1)
    found = surviving_share(dt, A, [distance], routes=[route], grid=GRID)
    torch.testing.assert_close(found[0, 0], share_by_impulses(dt[:, :, 0], A[0], route, distance), rtol=1e-12, atol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_constant_step_sizes_need_no_tokens(route):
    dt, A = random_decay(1)
    typical = dt.mean((0, 1))
    distances = list(range(LENGTH + 2))
    short = surviving_share(typical, A, distances, routes=[route], grid=GRID)
    long = surviving_share(typical.expand_as(dt), A, distances, routes=[route], grid=GRID)
    torch.testing.assert_close(short, long, rtol=1e-11, atol=0)


def test_routes_do_not_mix():
    dt, A = random_decay(len(ROUTES))
    together = surviving_share(dt, A, [1, 2, 5], routes=ROUTES, grid=GRID)
    for k, route in enumerate(ROUTES):
        alone = surviving_share(dt[:, :, k : k + 1], A[k : k + 1], [1, 2, 5], routes=[route], grid=GRID)
        assert torch.equal(together[k], alone[0])


def test_steps_multiply_and_memory_is_where_a_third_is_left():
    dt, A = torch.tensor([[0.01, 0.5]]), torch.tensor([[[-1.0, -2.0], [-1.0, -4.0]]])
    share = surviving_share(dt, A, [0, 3, 4, 7])
    assert torch.equal(share[:, 0], torch.ones_like(share[:, 0]))
    torch.testing.assert_close(share[:, 1] * share[:, 2], share[:, 3])
    memory = memory_tokens(dt, A)
    torch.testing.assert_close(memory, torch.tensor([[[100.0, 50.0], [2.0, 0.5]]], dtype=torch.float64))
    assert surviving_share(dt, A, [100])[0, 0, 0, 0] == pytest.approx(1 / math.e)


def test_the_summary_is_over_all_state_channels_of_a_route():
    dt, A = random_decay(2)
    share = surviving_share(dt.mean((0, 1)), A, [1, 9]).flatten(2)
    found = influence(dt.mean((0, 1)), A, [1, 9], quantiles=(0.0, 0.5, 1.0))
    torch.testing.assert_close(found.mean, share.mean(-1))
    torch.testing.assert_close(found.slowest, share.max(-1).values)
    assert found.quantiles.shape == (2, 2, 3)
    torch.testing.assert_close(found.quantiles[..., 2], found.slowest)
    torch.testing.assert_close(found.quantiles[..., 1], share.quantile(0.5, dim=-1))


def test_one_decay_per_head_is_a_state_of_one():
    dt, A = random_decay(2, states=1)
    torch.testing.assert_close(
        surviving_share(dt.mean((0, 1)), A[..., 0], [2]), surviving_share(dt.mean((0, 1)), A, [2])
    )


# Mamba's default: dt log-uniform in [1e-3, 1e-1], A = -1 ... -16. The exact law, on a fine grid of dt.
FINE_DT = torch.logspace(-3, -1, 20001, dtype=torch.float64).unsqueeze(0)
FINE_A = -torch.arange(1.0, 17.0, dtype=torch.float64).expand(1, FINE_DT.shape[1], 16)


@pytest.mark.parametrize(
    ("tokens", "share"), [(48, 0.243), (96, 0.113), (128, 0.080), (576, 0.0075), (2304, 0.0)], ids=str
)
def test_share_of_state_channels_of_the_default_that_remember_so_far(tokens, share):
    assert (memory_tokens(FINE_DT, FINE_A) >= tokens).double().mean() == pytest.approx(share, abs=6e-4)


def test_the_default_forgets_a_slice_of_48_by_48():
    """The mean of exp(-a n dt) over log-uniform dt is a difference of two exponential integrals."""
    row, plane = influence(FINE_DT, FINE_A, [48, 2304]).mean[0].tolist()
    a = np.arange(1, 17)
    exact = [np.mean(exp1(a * n * 1e-3) - exp1(a * n * 1e-1)) / math.log(100) for n in (48, 2304)]
    assert [row, plane] == pytest.approx(exact, rel=1e-3)
    assert exact == pytest.approx([0.196, 4.66e-4], rel=2e-3)


def test_a_random_draw_of_64_channels_lies_around_the_exact_values():
    """20 % after a row, 0.03 % and 7 % (slowest) after a slice were published for one such draw."""
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        core = ScanCore(64, d_state=16, dt_rank=2, routes=["dhw"])
        (decay,) = step_sizes(core.state_dict()).values()
        far = influence(decay.dt, decay.A, [48, 2304])
        found.append([*far.mean[0].tolist(), far.slowest[0, 1].item()])
    row, plane, slowest = torch.tensor(found).unbind(1)
    assert row.min() < 0.20 < row.max()
    assert plane.min() < 3e-4 < plane.max()
    assert slowest.min() < 0.07 < slowest.max() < math.exp(-2.304) * 1.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": [-1]}, "whole numbers >= 0"),
        ({"distances": [0.5]}, "whole numbers >= 0"),
        ({"A": torch.ones(1, 3, 2)}, "A must be negative"),
        ({"dt": torch.full((1, 3), math.nan)}, "dt must be positive"),
        ({"dt": torch.zeros(1, 3)}, "dt must be positive"),
        ({"dt": torch.ones(1, 4)}, r"got \(1, 4\) and \(1, 3, 2\)"),
        ({"dt": torch.ones(1, LENGTH, 1, 3)}, "need both"),
        ({"routes": ["dhw"]}, "go together"),
        ({"routes": "raster2", "grid": GRID}, "1 routes but 2 were named"),
        ({"dt": torch.ones(1, 5, 1, 3), "routes": ["dhw"], "grid": GRID}, "5 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_refused(change, message):
    arguments = {"dt": torch.ones(1, 3), "A": -torch.ones(1, 3, 2), "distances": [1], **change}
    with pytest.raises(ValueError, match=message):
        surviving_share(**arguments)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    return create_network("vmunet", 1, 2, strides=strides, base_features=8, depths=1, decoder_depths=1, d_state=4)


def test_every_scan_of_a_network_is_read_from_its_state_dict(network):
    found = step_sizes(network.state_dict())
    scans = placed_scans(network, 1, (16, 16, 16))
    assert sorted(found) == sorted(scan.name for scan in scans)
    for scan in scans:
        decay = found[scan.name]
        assert decay.dt.min() > 0.99e-3
        assert decay.dt.max() < 1.01e-1
        torch.testing.assert_close(decay.A, -torch.arange(1.0, 5.0, dtype=torch.float64).expand_as(decay.A))
    assert step_sizes({"a.weight": torch.ones(1)}) == {}


def test_measured_step_sizes_are_means_over_all_tokens(network):
    seen = {}
    x = torch.randn(2, 1, 16, 16, 24, generator=torch.Generator().manual_seed(0))
    hooks = [
        scan.core.register_forward_pre_hook(lambda core, inputs, name=scan.name: seen.update({name: inputs[0]}))
        for scan in placed_scans(network, 1, (16, 16, 16))
    ]
    network.train()
    found = measure_step_sizes(network, x)
    assert network.training
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_pre_hooks for module in network.modules())
    for name, u in seen.items():
        expected = network.get_submodule(name).step_sizes(u).double().mean((0, 1))
        torch.testing.assert_close(found[name].dt, expected, rtol=1e-6, atol=0)


def test_at_initialisation_the_bias_tells_the_step_sizes(network):
    """The projection's part of dt is small before training: within a factor of 1.5 for every route and channel."""
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    bias, measured = step_sizes(network.state_dict()), measure_step_sizes(network, x)
    for name, decay in bias.items():
        ratio = measured[name].dt / decay.dt
        assert 1 / 1.5 < ratio.min() <= ratio.max() < 1.5
