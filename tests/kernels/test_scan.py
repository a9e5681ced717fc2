"""The scan: every backend against the float64 definition, and the laws of the operator."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba_kernels import (
    BACKENDS,
    BackendError,
    backends,
    choose_backend,
    resolve_routes,
    selective_scan,
    selective_scan_reference,
    selective_scan_with_state,
    testing,
)
from medmamba_kernels.backends import chunked
from medmamba_kernels.routes import Route
from medmamba_kernels.testing import (
    SelfTest,
    assert_close,
    check_against_reference,
    make_problem,
    relative_rms,
    self_test,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

PROBLEMS = {
    "one voxel": {"grid": (1, 1, 1)},
    "odd": {"grid": (3, 5, 7), "channels": 5, "state_size": 3},
    "prime, two samples": {"grid": (2, 7, 11), "batch": 2, "channels": 3, "routes": "raster2"},
    "flat": {"grid": (1, 9, 6), "routes": "raster4", "state_size": 1},
    "a line": {"grid": (1, 1, 65), "routes": "raster2", "channels": 17, "state_size": 2},
    "twelve routes": {"grid": (2, 3, 4), "routes": "raster12", "channels": 2},
    "resets": {"grid": (4, 3, 5), "routes": "line6"},
    "curves": {"grid": (3, 4, 4), "routes": ["dhw:hilbert", "hwd:spiral:reset=plane", "dwh:zorder:reverse"]},
    "atrous": {"grid": (4, 5, 3), "routes": ["dhw:step=2x2x1:reset=phase", "wdh:step=1x3x2"]},
    "kept apart": {"grid": (3, 4, 5), "merge": "none"},
    "mean": {"grid": (3, 4, 5), "merge": "mean"},
    "masked": {"grid": (3, 4, 5), "mask_fraction": 0.5, "batch": 2},
    "masked with resets": {"grid": (3, 4, 5), "mask_fraction": 0.5, "routes": "line6", "merge": "none"},
    "final state": {"grid": (3, 5, 7), "batch": 2, "with_state": True},
    "final state, masked with resets": {
        "grid": (3, 4, 5),
        "mask_fraction": 0.5,
        "routes": ["dhw:reset=plane", "wdh:reset=line:reverse"],
        "with_state": True,
    },
    "low rank": {"grid": (3, 4, 5), "channels": 6, "dt_rank": 2, "batch": 2},
    "low rank, masked": {"grid": (3, 4, 5), "channels": 20, "dt_rank": 5, "mask_fraction": 0.5, "with_state": True},
    "heads": {"grid": (3, 4, 5), "channels": 12, "heads": 3, "batch": 2, "with_state": True},
    "heads, low rank, masked": {
        "grid": (3, 5, 7),
        "channels": 10,
        "heads": 5,
        "dt_rank": 2,
        "mask_fraction": 0.5,
        "routes": "line6",
        "merge": "none",
    },
    "one head of many states": {"grid": (2, 5, 7), "channels": 8, "heads": 1, "state_size": 33, "routes": ["dwh"]},
}


@pytest.fixture(params=sorted(set(BACKENDS) - {"triton"}))  # which has tests of its own, it needs a GPU
def backend(request):
    reason = BACKENDS[request.param].unavailable_reason(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"backend {request.param} cannot run here: {reason}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients_equal_the_definition(backend, name, dtype):
    check_against_reference(make_problem(**PROBLEMS[name]), backend, dtype)


# Lengths around the native library's block of 64 tokens, widths off the vector, all state sizes and numbers of routes.
SIZES = [
    (1, 40, 64, "raster12"),
    (2, 3, 16, "raster4"),
    (63, 17, 8, ["dhw"] * 8),
    (64, 33, 1, "raster6"),
    (65, 8, 4, "raster12"),
    (127, 5, 64, "raster2"),
    (300, 9, 16, "raster4"),
    (640, 18, 1, "raster2"),
]
#: The reference takes its time per token: what these state, ten blocks and four and a half state as well.
LONG = [(1000, 9, 16, "raster4"), (4096, 18, 1, "raster2")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size",
    [*SIZES, *(pytest.param(size, marks=pytest.mark.nightly) for size in LONG)],
    ids=lambda size: f"L {size[0]}, C {size[1]}, N {size[2]}, {size[3]}",
)
def test_sizes_off_every_block_and_vector(backend, size, dtype):
    length, channels, state_size, routes = size
    grid = next((d, h, length // (d * h)) for d in (10, 16, 1) for h in (16, 10, 1) if length % (d * h) == 0)
    p = make_problem(grid, channels=channels, state_size=state_size, routes=routes)
    spread = {"x": p.x.mT.contiguous().mT, "dt": p.dt.flip(1).contiguous().flip(1)}
    check_against_reference(replace(p, **spread), backend, dtype)


@pytest.mark.parametrize("kind", [{"state_size": 1}, {"state_size": 3}, {"heads": 2}, {"dt_rank": 2}], ids=str)
def test_gradients_pass_gradcheck(backend, kind):
    p = make_problem((2, 2, 3), channels=4, routes=["dhw", "hwd:reverse:reset=line"], with_state=True, **kind)
    leaves = {name: leaf.requires_grad_() for name, leaf in p.leaves.items()}

    def run(*tensors):
        return tuple(replace(p, **dict(zip(leaves, tensors, strict=True))).results(backend).values())

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("dt", [0.0, 1e-6, 1.0, 30.0, 100.0])
@pytest.mark.parametrize("rate", [1e-4, 1e3])
def test_extreme_steps_and_decays_stay_exact(backend, dt, rate):
    p = make_problem((2, 3, 5), channels=3, state_size=2, routes="raster2")
    p = replace(p, dt=torch.full_like(p.dt, dt), A=torch.full_like(p.A, -rate), dt_softplus=False, dt_bias=None)
    check_against_reference(p, backend, torch.float32)


def test_a_single_forward_route_is_an_ordinary_selective_scan():
    for name in ("scan1d_n1", "scan1d_n4"):
        data = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items() if k != "meta"}
        leaves = {k: data[k].double().requires_grad_() for k in ("u", "delta", "A", "B", "C", "D", "delta_bias")}
        for run in (selective_scan_reference, selective_scan_with_state):
            y, _ = run(
                leaves["u"].mT,
                leaves["delta"].mT.unsqueeze(2),
                leaves["A"].unsqueeze(0),
                leaves["B"].mT.unsqueeze(2),
                leaves["C"].mT.unsqueeze(2),
                leaves["D"].unsqueeze(0),
                dt_bias=leaves["delta_bias"].unsqueeze(0),
                routes=["dhw"],
                grid=(1, 1, 37),
            )
            y = y.mT
            assert_close(f"{name} y", y, data["y"], 1e-12)
            gradients = torch.autograd.grad((y * data["r"].double()).sum(), list(leaves.values()))
            for key, gradient in zip(leaves, gradients, strict=True):
                assert_close(f"{name} gradient of {key}", gradient, data[f"g:{key}"], 1e-12)


def test_a_route_is_a_permuted_scan(backend):
    """Reading in place equals permuting the volume, scanning in raster order and permuting back."""
    p = make_problem((3, 4, 5), channels=4)
    for k, route in enumerate(p.routes):
        order, inverse = route.order(p.grid), route.inverse(p.grid)
        one = replace(p, dt=p.dt[:, :, k : k + 1], A=p.A[k : k + 1], B=p.B[:, :, k : k + 1], C=p.C[:, :, k : k + 1])
        one = replace(one, D=p.D[k : k + 1], dt_bias=p.dt_bias[k : k + 1])
        moved = replace(one, x=one.x[:, order], dt=one.dt[:, order], B=one.B[:, order], C=one.C[:, order])
        expected = replace(moved, routes=(Route(),)).run(backend)[:, inverse]
        torch.testing.assert_close(replace(one, routes=(route,)).run(backend), expected)


def test_the_sum_over_routes_is_the_sum_of_single_routes(backend):
    p = make_problem((3, 4, 5))
    apart = replace(p, merge="none").run(backend)
    torch.testing.assert_close(p.run(backend), apart.sum(1))
    torch.testing.assert_close(replace(p, merge="mean").run(backend), apart.mean(1))


@pytest.mark.parametrize(
    "routes", ["raster12", "snake6", ["dhw:spiral", "whd:diagonal:flip=d"], ["dhw:step=3x2x3"]], ids=str
)
@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 4, 5), (1, 7, 2), (5, 1, 1), (2, 3, 7)], ids=str)
def test_reading_and_merging_alone_loses_no_voxel(backend, grid, routes):
    """Without a state only the direct path is left: every route must bring every voxel home, unchanged."""
    p = make_problem(grid, routes=routes, channels=3)
    p = replace(p, B=torch.zeros_like(p.B), D=torch.ones_like(p.D))
    assert torch.equal(replace(p, merge="none").run(backend), p.x.unsqueeze(1).expand(-1, len(p.routes), -1, -1))
    torch.testing.assert_close(p.run(backend), len(p.routes) * p.x)


def test_mirrored_input_on_the_reversed_route_gives_the_mirrored_output(backend):
    p = make_problem((3, 4, 5), routes=["dhw"])
    flip = {"x": p.x.flip(1), "dt": p.dt.flip(1), "B": p.B.flip(1), "C": p.C.flip(1)}
    mirrored = replace(p, routes=resolve_routes(["dhw:reverse"]), **flip)
    torch.testing.assert_close(mirrored.run(backend), p.run(backend).flip(1))


def test_a_forward_route_is_causal(backend):
    p = make_problem((2, 3, 4), routes=["hwd"])
    order = p.routes[0].order(p.grid)
    later = order[10:]
    edited = replace(p, x=p.x.clone().index_fill_(1, later, 7.0))
    before, after = p.run(backend), edited.run(backend)
    assert torch.equal(before[:, order[:10]], after[:, order[:10]])
    assert not torch.equal(before[:, later], after[:, later])


def test_resets_are_separate_scans(backend):
    p = make_problem((3, 4, 5), routes=["dhw:reset=line"])
    lines = {
        "x": p.x.view(12, 5, -1),
        "dt": p.dt.view(12, 5, 1, -1),
        "B": p.B.view(12, 5, 1, -1),
        "C": p.C.view(12, 5, 1, -1),
    }
    separate = replace(p, routes=(Route(),), grid=(1, 1, 5), **lines).run(backend)
    torch.testing.assert_close(p.run(backend), separate.view(1, 60, -1))


def test_masking_equals_cutting_the_tokens_out(backend):
    p = make_problem((1, 5, 6), routes=["dhw", "dhw:reverse"], mask_fraction=0.4)
    kept = p.dt_mask[0]
    cut = {name: getattr(p, name)[:, kept] for name in ("x", "dt", "B", "C")}
    expected = replace(p, dt_mask=None, grid=(1, 1, int(kept.sum())), **cut).run(backend)
    got = p.run(backend)
    torch.testing.assert_close(got[:, kept], expected)
    assert bool((got[:, ~kept] == 0).all())


@pytest.mark.parametrize("kind", [{}, {"heads": 2}, {"dt_rank": 3}], ids=str)
def test_what_masked_tokens_hold_is_never_read(backend, kind):
    p = make_problem((2, 4, 5), mask_fraction=0.4, **kind)
    poisoned = {}
    for name in ("x", "dt", "B", "C"):
        tensor = getattr(p, name).clone()
        tensor[~p.dt_mask] = float("nan")
        poisoned[name] = tensor
    cotangent = {"y": torch.ones_like(p.x)}
    clean = p.run_with_gradients(backend, cotangent)
    got = replace(p, **poisoned).run_with_gradients(backend, cotangent)
    for name, value in clean.items():
        assert torch.equal(got[name], value), name


def test_batches_are_independent(backend):
    p = make_problem((2, 3, 5), batch=3)
    one = {name: getattr(p, name)[1:2] for name in ("x", "dt", "B", "C")}
    torch.testing.assert_close(replace(p, **one).run(backend), p.run(backend)[1:2])


def test_strides_do_not_matter(backend):
    p = make_problem((2, 3, 5), channels=6)
    spread = {
        "x": p.x.mT.contiguous().mT,
        "dt": p.dt.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "B": torch.cat([p.B, p.C], dim=-1).split(p.B.shape[-1], dim=-1)[0],
    }
    assert not spread["x"].is_contiguous()
    assert not spread["B"].is_contiguous()
    assert torch.equal(replace(p, **spread).run(backend), p.run(backend))


def test_runs_repeat_bit_for_bit(backend):
    p = make_problem((4, 5, 6), channels=16, state_size=16).to(torch.float32)
    cotangent = {"y": torch.randn_like(p.x)}
    first, second = (p.run_with_gradients(backend, cotangent) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("step_elements", [1, 64, 2**20])
def test_the_chunk_size_changes_nothing(monkeypatch, step_elements):
    p = make_problem((3, 5, 7), channels=3, state_size=2)
    cotangent = {"y": torch.randn_like(p.x)}
    expected = p.run_with_gradients("torch", cotangent)
    monkeypatch.setitem(chunked._STEP_ELEMENTS, "cpu", step_elements)
    monkeypatch.setitem(chunked._BACKWARD_ELEMENTS, "cpu", step_elements)
    for name, value in p.run_with_gradients("torch", cotangent).items():
        assert_close(name, value, expected[name], 1e-12)


def test_low_rank_steps_equal_projected_steps(backend):
    p = make_problem((2, 3, 4), channels=6, dt_rank=2)
    projected = replace(p, dt=torch.einsum("blkr,kcr->blkc", p.dt, p.dt_weight), dt_weight=None)
    torch.testing.assert_close(p.run(backend), projected.run(backend))


def test_heads_are_channels_that_share_step_and_rate(backend):
    p = make_problem((2, 3, 4), channels=6, heads=3)
    spelled = replace(
        p,
        dt=p.dt.repeat_interleave(2, -1),
        dt_bias=p.dt_bias.repeat_interleave(2, -1),
        A=p.A.repeat_interleave(2, -1).unsqueeze(-1).expand(-1, -1, 4),
    )
    torch.testing.assert_close(p.run(backend), spelled.run(backend))


def test_the_final_state_continues_the_scan(backend):
    """A scan of the first half, then of the second half: the first half's state reaches every later token by decay."""
    p = make_problem((1, 1, 20), routes=["dhw"], with_state=True)
    halves = [
        replace(p, grid=(1, 1, 10), **{name: getattr(p, name)[:, part] for name in ("x", "dt", "B", "C")})
        for part in (slice(0, 10), slice(10, 20))
    ]
    first, second = (half.results(backend)["state"] for half in halves)
    steps = torch.nn.functional.softplus(p.dt[:, 10:, 0] + p.dt_bias[0]).sum(1)
    decay = torch.exp(steps.unsqueeze(-1) * p.A[0])
    torch.testing.assert_close(p.results(backend)["state"][:, 0], second[:, 0] + decay * first[:, 0])


def test_one_state_read_with_ones_is_the_output_itself(backend):
    p = make_problem((2, 3, 4), state_size=1, merge="none", with_state=True)
    p = replace(p, C=torch.ones_like(p.C), D=None)
    results = p.results(backend)
    last = torch.stack([results["y"][:, k, route.order(p.grid)[-1]] for k, route in enumerate(p.routes)], 1)
    torch.testing.assert_close(results["state"].squeeze(-1), last)


@pytest.mark.parametrize("kind", [{}, {"heads": 2}, {"dt_rank": 2}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_is_an_error_that_says_where(backend, kind, value):
    p = make_problem((3, 4, 5), batch=2, **kind)
    p.dt[1, 17, 3, -1] = value
    p = replace(p, dt_weight=None if p.dt_weight is None else p.dt_weight.abs())
    with pytest.raises(ValueError, match=r"finite and not negative.* sample 1, token 17, route 3, (channel|head) "):
        p.run(backend)


def test_a_negative_step_is_an_error(backend):
    p = make_problem((3, 4, 5))
    with pytest.raises(ValueError, match=r"dt must be finite and not negative after bias; \d+ of 1440 steps"):
        replace(p, dt_softplus=False).run(backend)


@pytest.mark.parametrize("shared", [(), ("A", "D", "dt_bias"), ("x", "A", "B", "D", "dt_bias")], ids=str)
def test_vmap_maps_over_the_scan(backend, shared):
    problems = [make_problem((2, 3, 4), channels=3, seed=seed, with_state=True) for seed in range(3)]
    first = problems[0]
    problems = [replace(p, **{name: getattr(first, name) for name in shared}) for p in problems]
    names = tuple(first.leaves)
    stacked = [getattr(first, n) if n in shared else torch.stack([getattr(p, n) for p in problems]) for n in names]
    axes = tuple(None if name in shared else 0 for name in names)

    def results(*tensors):
        return tuple(replace(first, **dict(zip(names, tensors, strict=True))).results(backend).values())

    def total(y, state):
        return (y.square().sum() + state.sum(),)

    leaves = [t.requires_grad_() for t in stacked]
    got = torch.func.vmap(results, in_dims=axes)(*leaves)
    one_by_one = [
        results(*[t if axis is None else t[v] for t, axis in zip(leaves, axes, strict=True)]) for v in range(3)
    ]
    expected = tuple(torch.stack(parts) for parts in zip(*one_by_one, strict=True))
    for mapped, single in zip(got, expected, strict=True):
        torch.testing.assert_close(mapped, single)
    gradients = (torch.autograd.grad(total(*y), leaves) for y in (got, expected))
    for mapped, single in zip(*gradients, strict=True):
        torch.testing.assert_close(mapped, single)


def test_half_precision_input_gives_float32_and_stays_finite_over_a_long_slow_scan(backend):
    length = 4096
    p = make_problem((1, 1, length), channels=2, state_size=2, routes=["dhw"])
    p = replace(p, dt=torch.full_like(p.dt, 0.1), A=torch.full_like(p.A, -1e-4), dt_softplus=False, dt_bias=None)
    p = replace(p, x=p.x.abs() * 50, B=p.B.abs() * 10, C=p.C.abs() * 10)
    half = p.to(torch.float16)
    y = half.run(backend)
    assert y.dtype == torch.float32
    assert float(y.abs().max()) > 65504  # float16 could not hold it
    expected = half.to(torch.float64).run("reference")
    # Every step multiplies by the same decay close to 1, so its rounding (half an ulp, 6e-8) adds up.
    assert relative_rms(y, expected) < length * 6e-8


def test_autocast_does_not_touch_the_state(backend):
    p = make_problem((2, 3, 5), channels=4).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = p.run(backend)
    assert torch.equal(inside, p.run(backend))


@pytest.mark.parametrize("kind", [{}, {"heads": 1}, {"dt_rank": 2}], ids=str)
@pytest.mark.parametrize("final_state", [False, True])
def test_the_operator_satisfies_opcheck(backend, kind, final_state):
    p = make_problem((2, 2, 3), channels=3, state_size=2, mask_fraction=0.3, **kind)
    tensors = [None if t is None else t.detach().requires_grad_() for t in (*p.leaves.values(), None)[:8]]
    text = " ".join(str(route) for route in p.routes)
    arguments = (*tensors, p.dt_mask, text, list(p.grid), True, "sum", final_state, True, backend)
    torch.library.opcheck(torch.ops.medmamba.selective_scan.default, arguments)


def test_a_compiled_function_keeps_the_scan_as_one_node(backend):
    p = make_problem((2, 3, 4), channels=3).to(torch.float32)

    def run(x):
        return selective_scan(x * 2, p.dt, p.A, p.B, p.C, p.D, routes=p.routes, grid=p.grid, backend=backend) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = p.x.clone().requires_grad_()
    torch.testing.assert_close(compiled(x), run(x))
    (expected,) = torch.autograd.grad(run(x).sum(), x)
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(got, expected)


def test_the_self_test_measures_an_error(backend):
    outcome = self_test(backend)
    assert outcome.passed
    assert 0 < outcome.error < 1e-6


def test_the_self_test_fails_on_a_wrong_gradient(monkeypatch):
    backward = chunked.backward
    monkeypatch.setattr(chunked, "backward", lambda *a: tuple(1.001 * g if g is not None else g for g in backward(*a)))
    assert not self_test("torch").passed


WRONG = {
    "x with two axes": ({"x": torch.zeros(60, 4)}, "x must be"),
    "a grid of another size": ({"grid": (3, 4, 6)}, "x has 60 tokens but grid"),
    "dt of one route": ({"dt": torch.zeros(1, 60, 1, 4)}, r"dt must have shape \(1, 60, 6, 4\)"),
    "A with other channels": ({"A": torch.zeros(6, 5, 4)}, r"A must have shape \(6, 4, 4\)"),
    "B with other states": ({"B": torch.zeros(1, 60, 6, 3)}, r"A must have shape \(6, 4, 3\)"),
    "B of one route": ({"B": torch.zeros(1, 60, 1, 4)}, r"B must have shape \(1, 60, 6, 4\)"),
    "integer x": ({"x": torch.zeros(1, 60, 4, dtype=torch.int64)}, "must be a floating tensor"),
    "a mask of floats": ({"dt_mask": torch.ones(1, 60)}, "dt_mask must be bool"),
    "an unknown merge": ({"merge": "max"}, "unknown merge 'max'; known: sum, mean, none"),
    "heads that do not divide": ({"A": torch.zeros(6, 3)}, "A has 3 heads, which must divide the 4 channels"),
    "A with four axes": ({"A": torch.zeros(6, 4, 4, 1)}, "A must be"),
    "B without routes": ({"B": torch.zeros(1, 60, 4)}, "B must be"),
    "C of other states": ({"C": torch.zeros(1, 60, 6, 5)}, r"C must have shape \(1, 60, 6, 4\)"),
    "no state": ({"B": torch.zeros(1, 60, 6, 0)}, "B must be"),
    "weights without rank": ({"dt_weight": torch.zeros(6, 4, 0)}, r"dt_weight must be \(routes, 4, rank\)"),
    "dt of another rank": ({"dt_weight": torch.zeros(6, 4, 3)}, r"dt must have shape \(1, 60, 6, 3\)"),
    "tensors on two devices": ({"C": torch.zeros(1, 60, 6, 4, device="meta")}, "C is on meta but x is on cpu"),
    "an empty grid": ({"grid": (3, 0, 5)}, "grid"),
    "no sample": ({"x": torch.zeros(0, 60, 4)}, "at least one sample and one channel"),
    "no channel": ({"x": torch.zeros(1, 60, 0)}, "at least one sample and one channel"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    change, message = WRONG[name]
    p = replace(make_problem((3, 4, 5)), **change)
    with pytest.raises(ValueError, match=message):
        p.run("torch")


def test_an_unknown_backend_names_the_known_ones(monkeypatch):
    p = make_problem((1, 1, 2))
    with pytest.raises(ValueError, match="unknown scan backend 'cuda'; known: auto"):
        p.run("cuda")
    monkeypatch.setenv("MEDMAMBA_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown scan backend 'fast'"):
        p.run("auto")


def test_a_named_backend_that_cannot_run_raises_instead_of_falling_back(monkeypatch):
    monkeypatch.setattr(chunked, "unavailable_reason", lambda device: "switched off for this test")
    with pytest.raises(BackendError, match="'torch' was asked for but cannot run on cpu: switched off"):
        make_problem((1, 1, 2)).run("torch")


def test_without_its_library_the_scan_warns_once_and_goes_on(tmp_path):
    code = """
import torch
from medmamba_kernels import BACKENDS, choose_backend
from medmamba_kernels.testing import make_problem
p = make_problem((2, 3, 4))
assert torch.equal(p.run("auto"), p.run("torch"))
assert torch.equal(torch.compile(lambda: p.run("auto"), backend="aot_eager")(), p.run("torch"))
print(choose_backend("auto", torch.device("cpu")))
"""
    environment = {**os.environ, "MEDMAMBA_NATIVE_LIBRARY": str(tmp_path / "nothing.so")}
    environment.pop("MEDMAMBA_BACKEND", None)
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["torch"]
    assert child.stderr.count("UserWarning") == 1
    assert "about 20 times slower: its native backend cannot be used on cpu" in child.stderr


@pytest.mark.parametrize("fault", ["wrong numbers", "a crash", "none"])
def test_an_unproven_gpu_backend_is_used_only_if_it_passes_its_self_test(monkeypatch, fault):
    def run(name, device):
        if fault == "a crash":
            raise RuntimeError("no ptxas")
        return SelfTest(0.5 if fault == "wrong numbers" else 1e-7, fault == "none")

    device = torch.device("cuda", 0)
    monkeypatch.setattr(BACKENDS["triton"], "unavailable_reason", lambda device: None)
    monkeypatch.setattr(testing, "self_test", run)
    monkeypatch.delenv("MEDMAMBA_BACKEND", raising=False)
    backends._automatic.cache_clear()
    if fault == "none":
        assert choose_backend("auto", device) == "triton"
    else:
        with pytest.warns(UserWarning, match="self-test (fails, error 5.0e-01|stopped with RuntimeError: no ptxas)"):
            assert choose_backend("auto", device) == "torch"
    assert choose_backend("triton", device) == "triton"
    backends._automatic.cache_clear()
