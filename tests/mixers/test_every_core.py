"""What every core must do, run over the registry: a new entry is tested without further work."""

from __future__ import annotations

import inspect
import json
import math

import pytest
import torch

from medmamba.mixers import CONTROLS, CORES, ScanCore, get_core
from medmamba_kernels.backends import assume_backend
from medmamba_kernels.testing import relative_rms

WIDTH = 12
ARGUMENTS = {"d_state": 4, "dt_rank": 2, "routes": "raster6"}
COMMON = set(inspect.signature(ScanCore).parameters)
#: Odd sizes, axes of size 1 in every place, and a single token.
GRIDS = [(3, 4, 5), (1, 5, 3), (4, 1, 3), (2, 3, 1), (1, 1, 7), (1, 1, 1)]
GRID = GRIDS[0]
every_core = pytest.mark.parametrize("name", sorted(CORES))


def make(name: str, width: int = WIDTH, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return get_core(name)(width, **{**ARGUMENTS, **changes})


def tokens(grid=GRID, batch: int = 2, width: int = WIDTH, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(grid))
    return torch.randn(batch, math.prod(grid), width, generator=generator, dtype=torch.float64).to(dtype)


def rms(y: torch.Tensor) -> float:
    return float(y.double().square().mean().sqrt())


def test_the_controls_are_cores():
    assert set(CONTROLS) < set(CORES)
    assert "scan" not in CONTROLS


@every_core
def test_one_set_of_weights_runs_on_any_grid(name):
    core = make(name).double()
    before = {key: tensor.clone() for key, tensor in core.state_dict().items()}
    for grid in GRIDS:
        y = core(tokens(grid), grid)
        assert y.shape == (2, math.prod(grid), WIDTH)
        assert y.dtype == torch.float64
        assert y.isfinite().all()
    after = core.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@every_core
@pytest.mark.parametrize("kernel_size", [(1, 3, 3), (3, 3)], ids=["thick slices", "image"])
def test_every_plan_has_its_core(name, kernel_size):
    grid = (3, 4, 5) if len(kernel_size) == 3 else (1, 4, 5)
    core = make(name, kernel_size=kernel_size).double()
    u = tokens(grid).requires_grad_()
    y = core(u, grid)
    assert y.shape == u.shape
    gradients = torch.autograd.grad(y.square().sum(), [u, *core.parameters()])
    assert all(g.isfinite().all() and g.any() for g in gradients)


@every_core
@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 5, 3)], ids=str)
def test_every_parameter_gets_a_gradient(name, grid):
    core = make(name).double()
    y = core(tokens(grid).requires_grad_(), grid)
    (y * torch.randn_like(y)).sum().backward()
    assert [key for key, p in core.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_core
def test_a_single_token_leaves_no_parameter_without_gradient(name):
    core = make(name).double()
    y = core(tokens((1, 1, 1)).requires_grad_(), (1, 1, 1))
    y.sum().backward()
    assert [key for key, p in core.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@every_core
def test_the_magnitude_does_not_grow_with_the_number_of_tokens(name):
    core = make(name, width=32)
    with torch.no_grad():
        sizes = [rms(core(tokens(g, 1, 32, torch.float32), g)) for g in ((4, 4, 4), (8, 8, 8), (16, 16, 16))]
    assert max(sizes) < 1.5 * sizes[0]
    if name != "hsm_ssd":  # all that it reads are means over the tokens, which vanish for white noise
        assert max(sizes) < 1.5 * min(sizes)


@every_core
def test_samples_do_not_see_each_other(name):
    core = make(name).double()
    u = tokens()
    torch.testing.assert_close(core(u, GRID)[1:], core(u[1:], GRID), rtol=1e-10, atol=1e-12)


@every_core
def test_any_strides_will_do(name):
    core = make(name).double()
    u = tokens()
    torch.testing.assert_close(core(u.mT.contiguous().mT, GRID), core(u, GRID), rtol=1e-10, atol=1e-12)


@every_core
def test_it_is_deterministic(name):
    core = make(name)
    u = tokens(dtype=torch.float32).requires_grad_()

    def run() -> list[torch.Tensor]:
        y = core(u, GRID)
        return [y, *torch.autograd.grad(y.square().sum(), [u, *core.parameters()])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@every_core
def test_masked_tokens_are_not_read(name):
    core = make(name).double()
    u = tokens(batch=3)
    mask = torch.rand(u.shape[:2], generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.3], [0.7], [0.0]])
    assert [bool(m.any()) for m in mask] == [True, True, False]
    results = []
    for noise in (0.0, 1e6, math.inf, math.nan):
        noisy = torch.where(mask.unsqueeze(-1), u, noise).requires_grad_()
        y = core(noisy, GRID, mask=mask)
        assert not y[~mask].any()
        into, *gradients = torch.autograd.grad((y * u).sum(), [noisy, *core.parameters()])
        assert not into[~mask].any()
        results.append([y, into, *gradients])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert all(tensor.isfinite().all() for tensor in results[0])


@every_core
def test_a_mask_that_keeps_everything_changes_nothing(name):
    core = make(name).double()
    u = tokens()
    kept = core(u, GRID, mask=torch.ones(u.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(kept, core(u, GRID), rtol=1e-10, atol=1e-12)


@every_core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_under_autocast_is_close_and_finite(name, dtype):
    core = make(name)
    u = tokens(dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        y, large = core(u, GRID), core(1000 * u, GRID)
    assert relative_rms(y, core(u.float(), GRID)) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert large.isfinite().all()


@every_core
def test_it_runs_without_data(name):
    with torch.device("meta"), assume_backend("torch"):
        core = make(name)
        assert core(torch.empty(2, 60, WIDTH), GRID).shape == (2, 60, WIDTH)


@every_core
def test_its_own_options_survive_json(name):
    parameters = inspect.signature(get_core(name)).parameters.values()
    own = {p.name: p.default for p in parameters if p.name not in COMMON and p.kind is p.KEYWORD_ONLY}
    again = json.loads(json.dumps(own))
    core, other = make(name), make(name, **again)
    assert list(core.state_dict()) == list(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(core.state_dict().values(), other.state_dict().values(), strict=True))


@every_core
def test_torch_compile_traces_it_in_one_piece(name):
    core = make(name)
    u = tokens(dtype=torch.float32).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    y, expected = compiled(u, GRID), core(u, GRID)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((y * weights).sum(), [u, *core.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [u, *core.parameters()])
    for a, b in zip([y, *ours], [expected, *theirs], strict=True):
        assert relative_rms(a, b) < 1e-5
