"""Laws of the controls: each lacks exactly what it is meant to lack, at the scan's number of parameters."""

from __future__ import annotations

import pytest
import torch

from medmamba.mixers import CONTROLS, DepthwiseCore, LTICore, ScanCore, ShuffledCore, WindowedCore, get_core
from medmamba.mixers.controls import WINDOW, scan_parameters
from medmamba.networks import create_network
from medmamba_kernels import resolve_routes

GRID = (3, 4, 5)
ARGUMENTS = {"d_state": 4, "dt_rank": 2, "routes": "raster6"}
MATCHED = sorted({"scan", *CONTROLS} - {"identity"})


def make(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return get_core(name)(6, **{**ARGUMENTS, **changes}).double()


def tokens(seed: int) -> torch.Tensor:
    return torch.randn(2, 60, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("routes", ["raster4", "raster6", "raster12"])
@pytest.mark.parametrize(("d_state", "dt_rank"), [(1, 6), (16, 8), (16, 20)])
def test_the_number_of_parameters_of_a_scan_is_known(d_state, dt_rank, routes):
    core = ScanCore(128, d_state=d_state, dt_rank=dt_rank, routes=routes)
    assert scan_parameters(128, d_state, dt_rank, len(core.routes)) == count(core)


@pytest.mark.parametrize("name", MATCHED)
@pytest.mark.parametrize(("d_state", "dt_rank"), [(1, 6), (16, 8), (16, 20)])
def test_a_control_has_the_parameters_of_the_scan(name, d_state, dt_rank):
    core = get_core(name)(128, d_state=d_state, dt_rank=dt_rank, routes="raster6")
    assert 0.98 * scan_parameters(128, d_state, dt_rank, 6) <= count(core) <= scan_parameters(128, d_state, dt_rank, 6)


@pytest.mark.parametrize("strides", [[[1, 1, 1], *[[2, 2, 2]] * 4], [[1, 1], *[[2, 2]] * 4]], ids=["3d", "2d"])
@pytest.mark.parametrize("name", MATCHED)
def test_a_network_with_a_control_has_the_parameters_of_the_network(name, strides):
    scan, control = (count(create_network("vmunet", 1, 2, strides=strides, ssm_mode=mode)) for mode in ("scan", name))
    assert abs(control - scan) <= 0.02 * scan


def test_shuffled_is_the_scan_on_two_strange_routes():
    core = make("shuffled")
    forward, backward = resolve_routes(["dhw:shuffle", "dhw:shuffle:reverse"])
    assert core.routes == (forward,) * 3 + (backward,) * 3
    scan = make("scan", routes=[str(route) for route in core.routes])
    scan.load_state_dict(core.state_dict())
    torch.testing.assert_close(core(tokens(1), GRID), scan(tokens(1), GRID), rtol=0, atol=0)
    steps = torch.stack(torch.unravel_index(forward.order((8, 8, 8)), (8, 8, 8)), 1).diff(dim=0).abs().sum(1)
    assert steps.double().mean() > 6  # of at most 21; strangers are 3 * 21 / 8 = 7.9 apart on average


def test_windowed_forgets_within_its_window():
    core = make("windowed", routes=["dhw"])
    u, edited = tokens(1), tokens(1)
    edited[:, 17] += 1
    changed = (core(u, GRID) != core(edited, GRID)).any(-1).any(0).nonzero().flatten()
    first = 17 // WINDOW * WINDOW
    assert changed.tolist() == list(range(17, first + WINDOW))
    with_reset = make("windowed", routes=["dhw:reset=line", "dhw:reset=3"])
    assert [route.reset for route in with_reset.routes] == ["line", "3"]


def test_lti_is_linear_and_the_scan_is_not():
    u, v = tokens(1), tokens(2)
    for name, linear in (("lti", True), ("dwconv", True), ("scan", False)):
        core = make(name)
        offset = core(torch.zeros_like(u), GRID)  # the bias of a convolution
        both = core(2 * u - 3 * v, GRID) - offset
        apart = 2 * (core(u, GRID) - offset) - 3 * (core(v, GRID) - offset)
        assert torch.allclose(both, apart) == linear, name


def test_lti_is_the_scan_with_constant_projections():
    core = make("lti")
    scan = make("scan")
    own = {name: value for name, value in core.state_dict().items() if name in scan.state_dict()}
    scan.load_state_dict({**scan.state_dict(), **own})
    with torch.no_grad():
        scan.dt_proj.zero_()
        scan.x_proj.zero_()
        scan.x_proj[:, 2:, 0] = torch.cat([core.B, core.C], 1)  # the first channel is 1 everywhere
    u = tokens(1)
    u[..., 0] = 1
    torch.testing.assert_close(core(u, GRID) - core.top_up(u), scan(u, GRID))


def test_dwconv_takes_the_largest_kernel_that_fits():
    sizes = {
        (16, 8, (3, 3, 3), "raster6"): (7, 7, 7),
        (1, 8, (3, 3, 3), "raster6"): (5, 5, 5),
        (16, 8, (1, 3, 3), "raster6"): (1, 19, 19),
        (16, 8, (3, 3), "raster4"): (15, 15),
    }
    for (d_state, dt_rank, kernel_size, routes), expected in sizes.items():
        core = DepthwiseCore(128, d_state=d_state, dt_rank=dt_rank, routes=routes, kernel_size=kernel_size)
        assert core.conv.kernel_size == expected


def test_dwconv_sees_its_kernel_and_no_further():
    core = DepthwiseCore(6, d_state=1, dt_rank=1, routes="raster6")  # 42 weights per channel: 3 x 3 x 3
    assert core.conv.kernel_size == (3, 3, 3)
    u = torch.randn(1, 60, 6)
    edited = u.clone()
    edited[:, 27] += 1  # voxel (1, 1, 2)
    changed = (core(u, GRID) != core(edited, GRID)).any(-1)[0].nonzero().flatten()
    distance = [max(abs(a - b) for a, b in zip(torch.unravel_index(i, GRID), (1, 1, 2), strict=True)) for i in changed]
    assert len(changed) == 27
    assert max(distance) == 1


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (1, 3, 3), (3, 3)], ids=str)
def test_dwconv_of_a_size_is_that_convolution_and_nothing_else(size, kernel_size):
    core = make("dwconv", kernel_size=kernel_size, size=size)
    assert core.conv.kernel_size == tuple(size if each > 1 else 1 for each in kernel_size)
    assert [key for key, _ in core.named_parameters()] == ["conv.weight", "conv.bias"]
    grid = (3, 4, 5) if len(kernel_size) == 3 else (1, 12, 5)
    volume = tokens(1).mT.reshape(2, 6, *grid[-len(kernel_size) :])
    torch.testing.assert_close(core(tokens(1), grid), core.conv(volume.contiguous()).flatten(2).mT)


@pytest.mark.parametrize(("size", "message"), [(0, "size .* 1 or more, got 0"), (4, "must be odd")])
def test_dwconv_refuses_sizes_without_a_centre(size, message):
    with pytest.raises(ValueError, match=message):
        make("dwconv", size=size)


def test_dwconv_reads_tokens_as_they_lie():
    core = make("dwconv", size=3)
    seen = []
    core.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    u = tokens(1)
    core(u, GRID)
    (volume,) = seen
    assert volume.data_ptr() == u.data_ptr()
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("core", [LTICore, DepthwiseCore])
def test_a_budget_too_small_for_a_top_up_needs_none(core):
    small = core(4, d_state=1, dt_rank=1, routes=["dhw"])
    assert small(torch.randn(1, 60, 4), GRID).shape == (1, 60, 4)


def test_the_scans_among_the_controls_are_found_as_scans():
    assert issubclass(ShuffledCore, ScanCore)
    assert issubclass(WindowedCore, ScanCore)
