"""Laws of cores: of the class by itself, or of a partial of it with options."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.mixers.identity import IdentityCore
from medmamba_kernels.backends import assume_backend
from medmamba_kernels.testing import relative_rms

from .law import Law, require

Core = Callable[..., nn.Module]
Grid = tuple[int, int, int]

WIDTH = 12
ARGUMENTS: dict[str, Any] = {"d_state": 4, "dt_rank": 2, "routes": "raster6"}
#: What every core is built from; further arguments are options of its own.
COMMON = frozenset(inspect.signature(IdentityCore).parameters)
#: Odd sizes, axes of size 1 in every place, and a single token.
GRIDS: list[Grid] = [(3, 4, 5), (1, 5, 3), (4, 1, 3), (2, 3, 1), (1, 1, 7), (1, 1, 1)]
GRID = GRIDS[0]
#: Kernels of the plan's convolutions, with a grid each.
PLANS: dict[str, tuple[tuple[int, ...], Grid]] = {
    "thick slices": ((1, 3, 3), (3, 4, 5)),
    "image": ((3, 3), (1, 4, 5)),
}
#: Limits of the relative rms error under autocast.
HALF = {"bfloat16": (torch.bfloat16, 0.05), "float16": (torch.float16, 0.01)}


def build(core: Core, width: int = WIDTH, **changes: Any) -> nn.Module:
    """A core with the same weights at every call, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return core(width, **{**ARGUMENTS, **changes})


def tokens(grid: Grid = GRID, batch: int = 2, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> Tensor:
    """(batch, L, width) of white noise."""
    generator = torch.Generator().manual_seed(math.prod(grid))
    return torch.randn(batch, math.prod(grid), width, generator=generator, dtype=torch.float64).to(dtype)


def rms_by_size(core: Core) -> list[float]:
    """Root mean square of the result for white noise on 4, 8 and 16 voxels per axis."""
    made = build(core, 32)
    with torch.no_grad():
        results = [made(tokens((n, n, n), 1, 32, torch.float32), (n, n, n)) for n in (4, 8, 16)]
    return [float(y.double().square().mean().sqrt()) for y in results]


def one_set_of_weights_runs_on_any_grid(core: Core, _: str) -> None:
    made = build(core).double()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    for grid in GRIDS:
        u = tokens(grid)
        y = made(u, grid)
        require(y.shape == u.shape, f"{tuple(u.shape)} on {grid} came back as {tuple(y.shape)}")
        require(y.dtype == u.dtype, f"{u.dtype} came back as {y.dtype}")
        require(bool(y.isfinite().all()), f"not finite on {grid}")
    after = made.state_dict()
    require(list(after) == list(before), "running it changes the names in its state")
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    require(not changed, f"running it changes {', '.join(changed)}")


def every_plan_has_its_core(core: Core, plan: str) -> None:
    kernel_size, grid = PLANS[plan]
    made = build(core, kernel_size=kernel_size).double()
    u = tokens(grid).requires_grad_()
    y = made(u, grid)
    require(y.shape == u.shape, f"{tuple(u.shape)} came back as {tuple(y.shape)}")
    _require_gradients(made, u, y.square().sum())


def every_parameter_gets_a_gradient(core: Core, grid: str) -> None:
    made = build(core).double()
    sizes = _grid(grid)
    u = tokens(sizes).requires_grad_()
    y = made(u, sizes)
    _require_gradients(made, u, (y * tokens(sizes).flip(1)).sum())


def a_single_token_leaves_no_parameter_without_gradient(core: Core, _: str) -> None:
    made = build(core).double()
    u = tokens((1, 1, 1)).requires_grad_()
    made(u, (1, 1, 1)).sum().backward()
    without = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    require(not without, f"no finite gradient: {', '.join(without)}")


def the_magnitude_does_not_grow_with_the_number_of_tokens(core: Core, _: str) -> None:
    sizes = rms_by_size(core)
    seen = ", ".join(f"{size:.2g}" for size in sizes)
    require(max(sizes) < 1.5 * sizes[0], f"rms of the result on 4, 8 and 16 voxels per axis: {seen}")


def samples_do_not_see_each_other(core: Core, _: str) -> None:
    made = build(core).double()
    u = tokens()
    _require_close(made(u, GRID)[1:], made(u[1:], GRID), "a sample beside another one and alone")


def any_strides_will_do(core: Core, _: str) -> None:
    made = build(core).double()
    u = tokens()
    _require_close(made(u.mT.contiguous().mT, GRID), made(u, GRID), "tokens that lie otherwise in memory")


def it_is_deterministic(core: Core, _: str) -> None:
    made = build(core)
    u = tokens(dtype=torch.float32).requires_grad_()
    first, second = _result_and_gradients(made, u), _result_and_gradients(made, u)
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    require(not differ, f"two runs differ in {', '.join(differ)}")


def masked_tokens_are_not_read(core: Core, _: str) -> None:
    made = build(core).double()
    u = tokens(batch=3)
    share = torch.tensor([[0.3], [0.7], [0.0]])  # a sample of which nothing is kept as well
    mask = torch.rand(u.shape[:2], generator=torch.Generator().manual_seed(1)) < share
    results = [_masked_run(made, u, mask, noise) for noise in (0.0, 1e6, math.inf, math.nan)]
    infinite = [name for name, tensor in results[0].items() if not tensor.isfinite().all()]
    require(not infinite, f"not finite: {', '.join(infinite)}")
    for other in results[1:]:
        differ = [name for name in other if not torch.equal(other[name], results[0][name])]
        require(not differ, f"what stands in masked tokens changes {', '.join(differ)}")


def a_mask_that_keeps_everything_changes_nothing(core: Core, _: str) -> None:
    made = build(core).double()
    u = tokens()
    kept = made(u, GRID, mask=torch.ones(u.shape[:2], dtype=torch.bool))
    _require_close(kept, made(u, GRID), "with a mask that keeps all, and without one")


def half_precision_under_autocast_is_close_and_finite(core: Core, half: str) -> None:
    dtype, limit = HALF[half]
    made = build(core)
    u = tokens(dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        y, large = made(u, GRID), made(1000 * u, GRID)
    error = relative_rms(y, made(u.float(), GRID))
    require(error < limit, f"differs from float32 by {error:.2g} (limit {limit})")
    require(bool(large.isfinite().all()), "not finite for an input of rms 1000")


def it_runs_without_data(core: Core, _: str) -> None:
    with torch.device("meta"), assume_backend("torch"):
        y = build(core)(torch.empty(2, 60, WIDTH), GRID)
    require(y.shape == (2, 60, WIDTH), f"(2, 60, {WIDTH}) came back as {tuple(y.shape)}")


def its_own_options_survive_json(core: Core, _: str) -> None:
    parameters = inspect.signature(core).parameters.values()
    own = {p.name: p.default for p in parameters if p.name not in COMMON and p.kind is p.KEYWORD_ONLY}
    without = [name for name, default in own.items() if default is inspect.Parameter.empty]
    require(not without, f"options without a default: {', '.join(without)}")
    state, other = build(core).state_dict(), build(core, **json.loads(json.dumps(own))).state_dict()
    require(list(state) == list(other), "other parameters with options from JSON")
    require(all(torch.equal(state[name], other[name]) for name in state), "other values with options from JSON")


def torch_compile_traces_it_in_one_piece(core: Core, _: str) -> None:
    made = build(core)
    u = tokens(dtype=torch.float32).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    weights = tokens(dtype=torch.float32).flip(1)
    y, expected = compiled(u, GRID), made(u, GRID)
    inputs = [u, *made.parameters()]
    ours = torch.autograd.grad((y * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    error = max(relative_rms(a, b) for a, b in zip([y, *ours], [expected, *theirs], strict=True))
    require(error < 1e-5, f"result or gradient differ by {error:.2g} when compiled")


def _grid(name: str) -> Grid:
    depth, height, width = map(int, name.split("x"))
    return depth, height, width


def _require_gradients(made: nn.Module, u: Tensor, loss: Tensor) -> None:
    inputs = {"the input": u, **dict(made.named_parameters())}
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    found = dict(zip(inputs, gradients, strict=True))
    without = [name for name, g in found.items() if g is None or not g.isfinite().all() or not g.any()]
    require(not without, f"no finite gradient, or one of zeros: {', '.join(without)}")


def _result_and_gradients(made: nn.Module, u: Tensor) -> dict[str, Tensor]:
    inputs = {"the gradient of the input": u, **dict(made.named_parameters())}
    y = made(u, GRID)
    gradients = torch.autograd.grad(y.square().sum(), list(inputs.values()))
    return {"the result": y, **dict(zip(inputs, gradients, strict=True))}


def _masked_run(made: nn.Module, u: Tensor, mask: Tensor, noise: float) -> dict[str, Tensor]:
    """Result and gradients with noise in the masked tokens; those two are 0 there."""
    noisy = torch.where(mask.unsqueeze(-1), u, noise).requires_grad_()
    y = made(noisy, GRID, mask=mask)
    require(not y[~mask].any(), "the result is not 0 where the mask is False")
    inputs = {"the gradient of the input": noisy, **dict(made.named_parameters())}
    gradients = dict(zip(inputs, torch.autograd.grad((y * u).sum(), list(inputs.values())), strict=True))
    require(not gradients["the gradient of the input"][~mask].any(), "a gradient reaches masked tokens")
    return {"the result": y, **gradients}


def _require_close(found: Tensor, expected: Tensor, which: str) -> None:
    """LawBroken unless two results of float64 agree."""
    require(found.shape == expected.shape, f"{which}: {tuple(found.shape)} and {tuple(expected.shape)}")
    error = float((found - expected).detach().abs().max())
    require(bool(torch.isclose(found, expected, rtol=1e-10, atol=1e-12).all()), f"{which}: they differ by {error:.2g}")


LAWS = (
    Law(
        "any grid",
        "one set of weights runs on any grid",
        "let no parameter depend on the grid; allow odd axes and axes of one token; do not write to buffers",
        one_set_of_weights_runs_on_any_grid,
    ),
    Law(
        "any plan",
        "thick slices and images have their core",
        "read the number of axes off kernel_size, and keep convolutions off axes where it is 1",
        every_plan_has_its_core,
        tuple(PLANS),
    ),
    Law(
        "gradients",
        "every parameter gets a gradient",
        "leave out what nothing uses, and start no factor of another parameter at 0",
        every_parameter_gets_a_gradient,
        ("3x4x5", "1x5x3"),
    ),
    Law(
        "one token",
        "a single token leaves no parameter without gradient",
        "use every parameter on every grid, if only with a gradient of 0; divide by nothing that can be 0",
        a_single_token_leaves_no_parameter_without_gradient,
    ),
    Law(
        "magnitude",
        "the magnitude does not grow with the number of tokens",
        "divide sums over tokens by their number, or by the sum of their weights",
        the_magnitude_does_not_grow_with_the_number_of_tokens,
    ),
    Law(
        "samples",
        "samples do not see each other",
        "take means and sums over tokens (axis 1), never over samples (axis 0)",
        samples_do_not_see_each_other,
    ),
    Law(
        "strides",
        "tokens may lie in memory in any way",
        "use reshape or flatten, not view, on what comes in",
        any_strides_will_do,
    ),
    Law(
        "repeatable",
        "the same input gives the same bits",
        "draw no random numbers and keep no state between two calls",
        it_is_deterministic,
    ),
    Law(
        "mask",
        "masked tokens are not read, and their result is 0",
        "begin and end with medmamba.mixers.mask.keep(u, mask), and count only tokens that take part",
        masked_tokens_are_not_read,
    ),
    Law(
        "full mask",
        "a mask that keeps all changes nothing",
        "compute the same with a mask as without one",
        a_mask_that_keeps_everything_changes_nothing,
    ),
    Law(
        "half precision",
        "half precision under autocast is finite and near float32",
        "compute in float32 (medmamba.mixers.precision) and answer float16 in float32",
        half_precision_under_autocast_is_close_and_finite,
        tuple(HALF),
    ),
    Law(
        "meta device",
        "it runs without data, for counts of parameters and memory",
        "create tensors on the device of the input; let no shape depend on values",
        it_runs_without_data,
    ),
    Law(
        "JSON",
        "its own options have defaults and survive a plans file",
        "give every option a default that JSON can hold, and accept a list where you accept a tuple",
        its_own_options_survive_json,
    ),
    Law(
        "compile",
        "torch.compile traces one graph with its gradient",
        "let no branch depend on the values of a tensor: no .item(), no `if tensor`",
        torch_compile_traces_it_in_one_piece,
    ),
)
