"""The global convolution against a dense one in float64, and the laws of its kernels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.layers import parameter_groups
from medmamba.mixers import GlobalConvCore
from medmamba.mixers.global_conv import KERNELS, toeplitz, two_sided, unit_energy

SCAN = {"d_state": 4, "dt_rank": 2, "routes": "raster6"}
WIDTH = 3
every_kernel = pytest.mark.parametrize("kernel", sorted(KERNELS))
GRIDS = [(3, 4, 5), (1, 5, 2), (4, 1, 3), (6, 1, 1), (1, 1, 1)]


def make(**options) -> GlobalConvCore:
    torch.manual_seed(0)
    core = GlobalConvCore(WIDTH, **{**SCAN, "terms": 4, "length": 4, **options}).double()
    with torch.no_grad():  # away from the values that they start at
        core.gain.add_(torch.randn_like(core.gain))
        core.D.add_(torch.randn_like(core.D))
    return core


def tokens(grid, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(grid))
    return torch.randn(batch, math.prod(grid), WIDTH, generator=generator, dtype=torch.float64)


def s4d_by_definition(module, lag: int) -> torch.Tensor:
    A = -0.5 + 1j * math.pi * torch.arange(4, dtype=torch.float64)
    dt = torch.exp(module.log_step)[..., None, None] * module.ratio
    C = torch.view_as_complex(module.C.contiguous())
    return 2 * (C * (torch.exp(dt * A) - 1) / A * torch.exp(dt * A * lag)).sum(-1).real


def fout_by_definition(module, lag: int) -> torch.Tensor:
    time = torch.exp(module.log_step)[..., None, None] * module.ratio * lag
    modes = torch.exp(2j * math.pi * torch.arange(4, dtype=torch.float64) * time)
    series = 2 * (torch.view_as_complex(module.C.contiguous()) * modes).sum(-1).real
    return torch.where(time[..., 0] <= 1, series, 0)


def free_by_definition(module, lag: int) -> torch.Tensor:
    w = module.weight
    squashed = torch.where(w > module.squash, w - module.squash, torch.where(w < -module.squash, w + module.squash, 0))
    padded = F.pad(squashed, (0, 1 + math.ceil(lag * module.ratio)))
    below = math.floor(lag * module.ratio)
    share = lag * module.ratio - below
    return (1 - share) * padded[..., below] + share * padded[..., below + 1]


BY_DEFINITION = {"s4d": s4d_by_definition, "fout": fout_by_definition, "free": free_by_definition}


def dense_kernel(core, kernel, grid) -> torch.Tensor:
    """(E, 2 D - 1, 2 H - 1, 2 W - 1), from the definitions alone."""
    factors = []
    for module, size in zip(core.kernels, grid, strict=True):
        at = [BY_DEFINITION[kernel](module, abs(lag))[..., int(lag < 0)] for lag in range(1 - size, size)]
        k = torch.stack(at, dim=-1)
        rows = [k[..., size - 1 - j : 2 * size - 1 - j] for j in range(size)]  # column j of the Toeplitz matrix
        square = torch.stack(rows, dim=-1).square().sum((-2, -1))
        square = torch.where(square > 0, square, 1)  # a kernel of zeros, on an axis of size 1, stays one
        factors.append(k * (size / square).sqrt().unsqueeze(-1))
    return torch.einsum("re,red,reh,rew->edhw", core.gain, *factors)


@every_kernel
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_the_dense_convolution_with_the_product_of_its_kernels(kernel, rank, grid):
    core = make(kernel=kernel, rank=rank, spacing=[2.5, 1.0, 1.5])
    u = tokens(grid).requires_grad_()
    dense = dense_kernel(core, kernel, grid).flip(1, 2, 3).unsqueeze(1)
    x = u.mT.reshape(2, WIDTH, *grid)
    y = F.conv3d(x, dense, padding=[size - 1 for size in grid], groups=WIDTH)
    expected = y.flatten(2).mT + core.D * u
    ours = core(u, grid)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), [u, *core.parameters()]) for y in (ours, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@every_kernel
def test_an_image_is_a_volume_with_one_slice(kernel):
    core = make(kernel=kernel, kernel_size=(3, 3))
    volume = make(kernel=kernel)
    assert len(core.kernels) == 2
    for own, other in zip(core.kernels, list(volume.kernels)[1:], strict=True):
        other.load_state_dict(own.state_dict())
    (slices, _, _) = volume.axis_kernels((1, 4, 5))
    with torch.no_grad():
        volume.gain.copy_(core.gain * slices[..., 0])
        volume.D.copy_(core.D)
    u = tokens((1, 4, 5))
    torch.testing.assert_close(core(u, (1, 4, 5)), volume(u, (1, 4, 5)))


@pytest.mark.parametrize(
    ("axes", "grid"), [((0,), (4, 3, 2)), ((0, 2), (3, 2, 4)), ((1,), (2, 1, 3)), ((0,), (1, 3, 2))]
)
def test_axes_that_are_left_out_are_not_mixed(axes, grid):
    core = make(axes=axes, rank=2)
    u = tokens(grid)
    kernels = dict(zip(axes, core.axis_kernels(grid), strict=True))
    matrices = [
        torch.stack([toeplitz(kernels[axis][r]) for r in range(2)])
        if axis in kernels
        else torch.eye(n, dtype=torch.float64).expand(2, u.shape[-1], n, n)
        for axis, n in enumerate(grid)
    ]
    volume = u.unflatten(1, grid)
    mixed = torch.einsum("re,reai,rebj,reck,nijke->nabce", core.gain, *matrices, volume)
    torch.testing.assert_close(core(u, grid), mixed.flatten(1, 3) + core.D * u)


@pytest.mark.parametrize("axes", [(), (3,), (-1,)])
def test_axes_that_an_image_does_not_have_are_refused(axes):
    with pytest.raises(ValueError, match="axes must name some of the 3 axes"):
        make(axes=axes)


@every_kernel
@pytest.mark.parametrize("rank", [1, 4])
def test_white_noise_keeps_its_mean_square_at_any_size(kernel, rank):
    torch.manual_seed(0)
    core = GlobalConvCore(256, **SCAN, kernel=kernel, rank=rank)
    core.D.data.zero_()
    for grid in ((1, 1, 9), (5, 6, 7), (16, 16, 16), (1, 30, 30)):
        y = core(torch.randn(1, math.prod(grid), 256), grid)
        assert y.square().mean().item() == pytest.approx(0.5, rel=0.2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99))
def test_a_kernel_has_the_energy_of_the_identity(size, seed):
    k = torch.randn(2, 2 * size - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = toeplitz(unit_energy(k))
    assert torch.linalg.matrix_norm(matrix).tolist() == pytest.approx([math.sqrt(size)] * 2)
    for i in range(size):
        for j in range(size):
            assert torch.equal(toeplitz(k)[:, i, j], k[:, i - j + size - 1])


def test_a_kernel_of_zeros_stays_zero():
    k = torch.zeros(3, 5, requires_grad=True)
    unit_energy(k).sum().backward()
    assert not unit_energy(k).any()
    assert k.grad.isfinite().all()


def test_backward_lags_stand_in_front():
    k = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    assert two_sided(k).tolist() == [30.0, 20.0, 1.0, 2.0, 3.0]


@every_kernel
def test_a_larger_patch_has_the_same_kernel_and_more_of_it(kernel):
    (module, *_) = make(kernel=kernel, length=9).kernels
    assert torch.allclose(module(4), module(9)[..., :4], rtol=1e-12, atol=1e-12)


@every_kernel
def test_twice_the_spacing_is_every_second_lag(kernel):
    fine = make(kernel=kernel, length=9).kernels[0]
    coarse = make(kernel=kernel, length=9, spacing=[2, 1, 1]).kernels[0]
    coarse.load_state_dict(fine.state_dict())
    expected = fine(9)[..., ::2]
    if kernel == "s4d":  # its factor for the zero-order hold belongs to the step, not to the lag
        expected = torch.stack([s4d_by_definition(coarse, lag) for lag in range(5)], dim=-1)
    torch.testing.assert_close(coarse(5), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kernel", "cycles"), [("s4d", 0.5), ("fout", 1.0)])
def test_a_band_limit_leaves_out_what_an_axis_cannot_hold(kernel, cycles):
    step, ratio = 0.2, 2.0
    core = make(kernel=kernel, steps=[step, step], spacing=[ratio, 1, 1], band_limit=1.0)
    unlimited = make(kernel=kernel, steps=[step, step], spacing=[ratio, 1, 1])
    for limited, module, spacing in zip(core.kernels, unlimited.kernels, (ratio, 1, 1), strict=True):
        module.load_state_dict(limited.state_dict())
        holds = torch.arange(4) * cycles * step * spacing <= 0.5
        with torch.no_grad():
            module.C[..., ~holds, :] = 0
        torch.testing.assert_close(limited(6), module(6))
    assert not torch.allclose(core.kernels[0](6), make(kernel=kernel, steps=[step, step]).kernels[0](6))


def test_a_fourier_kernel_ends_after_one_timescale():
    (module, *_) = make(kernel="fout", steps=[0.25, 0.25]).kernels
    k = module(8)
    assert k[..., :5].any(dim=0).all()
    assert not k[..., 5:].any()


def test_a_free_kernel_ends_after_its_length():
    u = tokens((1, 1, 12)).requires_grad_()
    core = make(kernel="free", length=3)
    (gradient,) = torch.autograd.grad(core(u, (1, 1, 12))[:, 6].sum(), u)
    assert gradient.any(-1).all(0).nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_squashing_leaves_most_of_a_free_kernel_and_of_its_gradient():
    torch.manual_seed(0)
    core = GlobalConvCore(64, **SCAN, kernel="free")
    grid = (32, 4, 4)
    y = core(torch.randn(1, 512, 64), grid)
    (y * torch.randn_like(y)).sum().backward()
    module = core.kernels[0]
    zero = (module(32) == 0).double().mean().item()
    assert 0.05 < zero < 0.11  # 8 % of a normal distribution lie within 0.1
    # The first weight of the backward direction has the lag 0, which is the forward direction's.
    assert (module.weight.grad[:, :, 0] != 0).double().mean().item() > 0.89


def test_it_sees_the_whole_volume():
    grid = (5, 6, 7)
    u = tokens(grid, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(make()(u, grid)[0, 0].sum(), u)
    assert gradient.any(-1).all()


def test_weight_decay_spares_it():
    core = make()
    decayed, _ = parameter_groups(core, 0.1)
    assert decayed["params"] == []


def test_weights_in_half_precision_answer_too():
    core = GlobalConvCore(8, **SCAN).bfloat16()
    y = core(torch.randn(1, 60, 8, dtype=torch.bfloat16), (3, 4, 5))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "s4"}, "unknown kernel 's4' of the global convolution; known: fout, free, s4d"),
        ({"rank": 0}, "rank of the global convolution must be 1 or more, got 0"),
        ({"terms": 0}, "terms of the global convolution must be 1 or more"),
        ({"length": 0}, "length of the global convolution must be 1 or more"),
        ({"spacing": [1, 1]}, "one positive number for each of the 3 axes"),
        ({"spacing": [1, 1, 0]}, "one positive number for each of the 3 axes"),
        ({"steps": [0.5, 0.1]}, "steps must be 0 < low <= high"),
        ({"band_limit": 0.0}, "band_limit must be positive"),
        ({"band_limit": 1.0, "kernel": "free"}, r"for a kernel of modes \(s4d, fout\), got 1.0 for free"),
        ({"squash": 1.0}, "squash must be from 0 to below 1 standard deviation"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
