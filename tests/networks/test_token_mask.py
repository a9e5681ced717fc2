"""Forward passes with a mask of voxels: what the scans may see, and what still reaches the tokens that are kept."""

from __future__ import annotations

import math
import threading
from functools import partial

import pytest
import torch

from medmamba.layers.vss import SS2D, VSSBlock
from medmamba.mixers import CORES, MultiHeadCore, get_core, pool_mask, token_mask
from medmamba.mixers.mamba import Mamba
from medmamba.networks import NETWORKS, create_network

WIDTH = 6
ARGUMENTS = {"d_state": 3, "dt_rank": 2}
GRIDS = [(3, 5, 7), (1, 6, 5), (1, 1, 9), (2, 1, 4), (1, 1, 1)]
SIZES = {
    "mednext": {"base_features": 4, "depths": 1, "expansion": 2},
    "mednextmamba": {"base_features": 4, "depths": 1, "expansion": 2, "d_state": 2},
    "mhsvm": {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2},
    "msvmunet": {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2},
    "vmunet": {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2},
}
CASES = {
    "3d": ([[1, 1, 1], [2, 2, 2], [2, 2, 2]], (8, 12, 8)),
    "thick slices": ([[1, 1, 1], [1, 2, 2], [2, 2, 2]], (6, 8, 12)),
    "2d": ([[1, 1], [2, 2], [2, 2]], (12, 20)),
}


def make(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return get_core(name)(WIDTH, **{**ARGUMENTS, "routes": "raster6", **changes}).double().eval()


def network(name: str, strides) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_network(name, 1, 2, strides=strides, **SIZES.get(name, {})).eval()


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coin(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def scan_of_the_kept(core, u, grid, mask):
    """What a scan does if masked tokens are cut out of every route, step by step."""
    out = torch.zeros_like(u)
    for sample, kept in zip(range(len(u)), mask, strict=True):
        for k, route in enumerate(core.routes):
            state = torch.zeros(WIDTH, core.d_state, dtype=u.dtype)
            sequence = [token for token in route.order(grid).tolist() if kept[token]]
            for token in sequence:
                x = u[sample, token]
                r, B, C = (core.x_proj[k] @ x).split([core.dt_rank, core.d_state, core.d_state])
                dt = torch.nn.functional.softplus(core.dt_proj[k] @ r + core.dt_bias[k])[:, None]
                state = torch.exp(-dt * core.A_log[k].exp()) * state + dt * x[:, None] * B
                out[sample, token] += state @ C + core.D[k] * x
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_kept_tokens_get_what_they_get_with_the_others_cut_out_of_every_route(grid):
    core, length = make("scan", routes="raster12"), math.prod(grid)
    u, mask = values(2, length, WIDTH), coin(2, length)
    with torch.no_grad():
        result, expected = core(u, grid, mask=mask), scan_of_the_kept(core, u, grid, mask)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CORES))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_masked_voxels_hold_reaches_no_kept_token_of_a_core(name, grid):
    core, length = make(name), math.prod(grid)
    u, mask = values(2, length, WIDTH), coin(2, length)
    other = torch.where(mask[..., None], u, torch.nan)
    with torch.no_grad(), token_mask(core, mask.view(2, *grid)):
        assert torch.equal(core(u, grid), core(other, grid))
        assert torch.equal(core(u, grid), core(u, grid, mask=mask))


@pytest.mark.parametrize("name", sorted(CORES))
@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_a_mask_that_keeps_all_tokens_gives_the_bits_of_no_mask(name, grid):
    core, length = make(name).float(), math.prod(grid)
    u = values(2, length, WIDTH, dtype=torch.float32).requires_grad_()
    everything = torch.ones(2, length, dtype=torch.bool)
    free, kept = core(u, grid), core(u, grid, mask=everything)
    assert torch.equal(free, kept)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), u)[0] for y in (free, kept)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_network_whose_every_token_keeps_a_voxel_gives_the_bits_of_no_mask(name, case):
    strides, patch = CASES[case]
    net = network(name, strides)
    x, mask = values(2, 1, *patch, dtype=torch.float32), torch.ones(2, *patch, dtype=torch.bool)
    with torch.no_grad():
        expected = net(x)
        with token_mask(net, mask):
            assert torch.equal(net(x), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"mednext"}))
def test_every_core_of_a_network_gets_the_mask_of_its_grid(name, case):
    strides, patch = CASES[case]
    net = network(name, strides)
    seen = []
    inner = [each for each in net.modules() if isinstance(each, tuple(CORES.values()))]
    assert inner
    mask = torch.zeros(2, *patch, dtype=torch.bool)
    mask[0, ..., : patch[-1] // 2] = True
    mask[1, ..., -1] = True
    with torch.no_grad(), token_mask(net, mask):
        for core in inner:
            core.register_forward_pre_hook(
                lambda _, inputs, options: seen.append((inputs[1], options["mask"])), with_kwargs=True
            )
        assert net(values(2, 1, *patch, dtype=torch.float32)).isfinite().all()
    assert len(seen) == len(inner)
    for grid, given in seen:
        columns = given.view(2, *grid)
        width = grid[2]
        assert columns[0, ..., : width // 2].all()
        assert columns[0].sum(-1).unique().tolist() == [(width + 1) // 2]  # a token with a kept voxel is kept
        assert columns[1].sum(-1).unique().tolist() == [1]
        assert columns[1, ..., -1].all()


@pytest.mark.parametrize("name", sorted(CORES))
def test_of_masked_voxels_only_the_neighbours_of_kept_ones_reach_the_result(name):
    """VMamba's blocks normalise token by token, and their convolutions reach one voxel: exactly that far, at any depth.

    The kept neighbour sees the masked voxel by its convolution, and the scan carries that to all kept tokens.
    """
    torch.manual_seed(0)
    core = partial(get_core(name), d_state=2, routes="raster4")
    ss2d = partial(SS2D, core=core, expand=1.0)
    blocks = torch.nn.Sequential(*(VSSBlock(4, ss2d=ss2d, kernel_size=(3, 3), drop_path=0.0) for _ in range(3)))
    x = values(1, 5, 20, 4, dtype=torch.float32).requires_grad_()
    mask = torch.ones(1, 5, 20, dtype=torch.bool)
    mask[..., :11] = False
    with token_mask(blocks, mask):
        (gradient,) = torch.autograd.grad(blocks(x)[mask].square().sum(), x)
    columns = (gradient != 0).any(-1)[0].any(0)
    assert columns.tolist() == [False] * 10 + [True] * 10


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_token_is_kept_if_any_of_its_voxels_is(ndim):
    shape, grid = ((6, 4, 10), (3, 4, 2)) if ndim == 3 else ((4, 10), (1, 4, 2))
    mask = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) < 0.15
    pooled = pool_mask(mask, grid).view(2, *grid)
    volume = mask.view(2, *(1,) * (3 - ndim), *shape)
    expected = torch.nn.functional.adaptive_max_pool3d(volume.float(), grid).bool()
    assert torch.equal(pooled, expected)
    assert pooled.any()
    assert not pooled.all()


def test_heads_and_directions_are_cores_too():
    grid, mask = (2, 3, 4), coin(1, 2, 3, 4)
    torch.manual_seed(0)
    scan = lambda width, **options: get_core("scan")(width, d_state=2, **options)  # noqa: E731
    heads = MultiHeadCore(WIDTH, core=scan, routes=["raster2", ["hwd"]])
    u = values(1, 24, WIDTH, dtype=torch.float32)
    with torch.no_grad(), token_mask(heads, mask):
        assert torch.equal(heads(u, grid), heads(u, grid, mask=mask.flatten(1)))
    layer = Mamba(4, core=scan, routes="raster2")
    x = values(1, *grid, 4, dtype=torch.float32)
    changed = x.clone()
    changed[~mask] = 9
    with torch.no_grad(), token_mask(layer, mask):
        assert torch.equal(layer(x)[mask], layer(changed)[mask])


def test_nothing_stays_on_a_network_after_an_error():
    core, grid = make("scan"), (2, 3, 4)
    u, mask = values(1, 24, WIDTH), coin(1, 2, 3, 4)
    with torch.no_grad():
        free = core(u, grid)
        with pytest.raises(ValueError, match="batch of 1"), token_mask(core, mask):
            core(u.repeat(2, 1, 1), grid)
        assert torch.equal(core(u, grid), free)
    assert not core._forward_pre_hooks


def test_the_innermost_mask_counts_and_the_outer_one_returns():
    core, grid = make("scan"), (2, 3, 4)
    u, outer, inner = values(1, 24, WIDTH), coin(1, 2, 3, 4), coin(1, 2, 3, 4, seed=1)
    with torch.no_grad():
        expected = [core(u, grid, mask=mask.flatten(1)) for mask in (outer, inner, outer)]
        with token_mask(core, outer):
            found = [core(u, grid)]
            with token_mask(core, inner):
                found.append(core(u, grid))
            found.append(core(u, grid))
    assert all(map(torch.equal, found, expected))


def test_another_thread_runs_the_same_network_without_the_mask():
    core, grid = make("scan"), (2, 3, 4)
    u, mask = values(1, 24, WIDTH), coin(1, 2, 3, 4)
    found = []

    def run():
        with torch.no_grad():
            found.append(core(u, grid))

    with torch.no_grad():
        free = core(u, grid)
        with token_mask(core, mask):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            run()
    assert torch.equal(found[0], free)
    assert not torch.equal(found[1], free)


def test_masked_tokens_get_no_gradient_and_the_weights_do():
    core, grid = make("scan"), (2, 3, 4)
    u, mask = values(1, 24, WIDTH).requires_grad_(), coin(1, 2, 3, 4)
    with token_mask(core, mask):
        core(u, grid).square().sum().backward()
    assert torch.equal((u.grad != 0).all(-1), mask.flatten(1))
    assert torch.equal((u.grad != 0).any(-1), mask.flatten(1))
    assert all(parameter.grad.any() for parameter in core.parameters())


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_patch_of_nothing_gives_finite_logits(name):
    strides, patch = CASES["3d"]
    net = network(name, strides)
    with torch.no_grad(), token_mask(net, torch.zeros(1, *patch, dtype=torch.bool)):
        assert net(torch.zeros(1, 1, *patch)).isfinite().all()


def test_masks_that_cannot_be_meant_are_refused():
    core, grid, u = make("scan"), (2, 3, 4), values(2, 24, WIDTH)
    with pytest.raises(TypeError, match="float32"), token_mask(core, torch.zeros(2, 2, 3, 4)):
        pass
    with pytest.raises(ValueError, match=r"\(24,\)"), token_mask(core, coin(24)):
        pass
    with pytest.raises(ValueError, match="batch of 1"), token_mask(core, coin(1, 2, 3, 4)):
        core(u, grid)
    undivided = r"\(2, 5, 4\) voxels cannot be divided into \(2, 3, 4\)"
    with pytest.raises(ValueError, match=undivided), token_mask(core, coin(2, 2, 5, 4)):
        core(u, grid)
