"""The native CPU backend against a plain float64 loop, and what a compiled library must never do.

The loop below takes any order table and any resets, more than the routes of ``medmamba_kernels.routes`` produce; the
backend behind the public operator is tested in ``test_scan.py``.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba_kernels.backends import native
from medmamba_kernels.inputs import ScanInputs

ROOT = Path(__file__).parents[2]
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "dt_weight")
# Norm-relative error against float64 on the same inputs.
TOLERANCES = {
    torch.float32: {"y": 1e-6, "x": 1e-6, "state": 1e-6, "other": 1e-5},
    torch.float64: {"y": 1e-13, "x": 1e-13, "state": 1e-13, "other": 1e-12},
}


@pytest.fixture(autouse=True)
def _library():
    reason = native.unavailable_reason(torch.device("cpu"))
    if reason is not None:
        if os.environ.get("MEDMAMBA_REQUIRE_NATIVE") == "1":
            pytest.fail(f"MEDMAMBA_REQUIRE_NATIVE=1 and {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def nan_outputs(monkeypatch):
    """Every buffer that the backend allocates starts as NaN."""
    real = torch.empty
    monkeypatch.setattr(native.torch, "empty", lambda *a, **kw: real(*a, **kw).fill_(math.nan))


@dataclass(frozen=True)
class Case(ScanInputs):
    """Arguments of one backend call, and what must come out."""

    def to(self, dtype: torch.dtype) -> Case:
        changed = {name: getattr(self, name).to(dtype) for name in NAMES if getattr(self, name) is not None}
        return replace(self, **changed)

    def cotangent(self) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(self.output_shape(), generator=generator, dtype=torch.float64)

    def state_cotangent(self) -> Tensor:
        return torch.randn(self.final_shape(), generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def run(self) -> dict[str, Tensor]:
        """y, the final state if asked for, and all gradients; keyed by name, absent inputs have no gradient."""
        y, states, final = native.forward(self)
        dfinal = self.state_cotangent().to(final.dtype) if self.final_state else None
        gradients = native.backward(self, self.cotangent().to(y.dtype), dfinal, states)
        for gradient, tensor in zip(gradients, self.differentiable, strict=True):
            assert (gradient is None) == (tensor is None)
        results = {"y": y, "state": final} if self.final_state else {"y": y}
        return results | {n: g for n, g in zip(NAMES, gradients, strict=True) if g is not None}

    def expect(self) -> dict[str, Tensor]:
        """The same from the loop, in float64, through autograd."""
        case = self.to(torch.float64)
        leaves = {n: getattr(case, n).requires_grad_() for n in NAMES if getattr(case, n) is not None}
        y, state = loop(replace(case, **leaves))
        total = (y * self.cotangent()).sum()
        if self.final_state:
            total = total + (state * self.state_cotangent()).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        results = {"y": y.detach(), "state": state.detach()} if self.final_state else {"y": y.detach()}
        return results | dict(zip(leaves, gradients, strict=True))


def loop(c: Case) -> tuple[Tensor, Tensor]:
    """One token after the other, all routes and samples at once; the definition of the scan."""
    route = c.order.long()
    dt = c.dt if c.dt_weight is None else torch.einsum("blkr,kcr->blkc", c.dt, c.dt_weight)
    dt = dt if c.dt_bias is None else dt + c.dt_bias
    dt = F.softplus(dt) if c.dt_softplus else dt
    A = c.A
    if A.dim() == 2:  # a head is a run of channels
        head = torch.arange(c.x.shape[-1]) * A.shape[1] // c.x.shape[-1]
        dt, A = dt[..., head], A[:, head, None]
    k = torch.arange(len(route)).unsqueeze(1)
    dt_BKLC, B_BKLN, C_BKLN = dt[:, route, k], c.B[:, route, k], c.C[:, route, k]
    x_BKLC = c.x[:, route]
    visible = torch.ones(x_BKLC.shape[:3], dtype=torch.bool)
    if c.dt_mask is not None:
        visible = c.dt_mask[:, route]
        hidden = ~visible.unsqueeze(-1)
        dt_BKLC, x_BKLC = dt_BKLC.masked_fill(hidden, 0), x_BKLC.masked_fill(hidden, 0)
        B_BKLN, C_BKLN = B_BKLN.masked_fill(hidden, 0), C_BKLN.masked_fill(hidden, 0)
    keep = torch.ones(route.shape, dtype=c.x.dtype) if c.starts is None else (~c.starts).to(c.x.dtype)
    steps = (dt_BKLC.unbind(2), x_BKLC.unbind(2), B_BKLN.unbind(2), keep.unbind(1))
    batch, _, channels, routes, size = c.sizes
    h, states = torch.zeros(batch, routes, channels, size, dtype=c.x.dtype), []
    for step, value, weight, kept in zip(*steps, strict=True):
        drive = (step * value).unsqueeze(-1) * weight.unsqueeze(2)
        h = torch.exp(step.unsqueeze(-1) * A) * (h * kept.view(-1, 1, 1)) + drive
        states.append(h)
    if not states:
        return torch.zeros(c.output_shape(), dtype=c.x.dtype), h
    y = torch.einsum("bklcn,bkln->bklc", torch.stack(states, 2), C_BKLN)
    if c.D is not None:
        y = y + c.D.unsqueeze(1) * x_BKLC
    y = y * visible.unsqueeze(-1)
    y = torch.zeros_like(y).index_put((torch.arange(len(y)).view(-1, 1, 1), k, route), y)
    return (y.sum(1) if c.merge == "sum" else y), h


def make(
    batch=1,
    length=65,
    channels=8,
    states=4,
    routes=1,
    *,
    heads=0,
    rank=0,
    merge="sum",
    mask=0.0,
    resets=0.0,
    plain=False,
    final=False,
    seed=0,
) -> Case:
    """A random float64 case of ordinary magnitude on random permutations; ``plain`` has no D and no bias."""
    steps = heads or channels
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return Case(
        x=normal(batch, length, channels),
        dt=normal(batch, length, routes, rank or steps),
        A=-torch.exp(normal(routes, heads) if heads else normal(routes, channels, states)),
        B=normal(batch, length, routes, states),
        C=normal(batch, length, routes, states),
        D=None if plain else normal(routes, channels),
        dt_bias=None if plain else normal(routes, steps) - 2,
        dt_weight=normal(routes, steps, rank) / math.sqrt(rank) if rank else None,
        dt_mask=torch.rand(batch, length, generator=g) >= mask if mask else None,
        order=torch.stack([torch.randperm(length, generator=g).int() for _ in range(routes)]),
        starts=torch.rand(routes, length, generator=g) < resets if resets else None,
        merge=merge,
        final_state=final,
    )  # fmt: skip


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == dtype
        assert got[name].shape == value.shape, name
        scale = value.norm().item() or 1.0
        error = (got[name].double() - value).norm().item() / scale
        limit = TOLERANCES[dtype].get(name, TOLERANCES[dtype]["other"])
        assert error <= limit, f"{name}: norm-relative error {error:.2e} above {limit:.0e}"


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


CASES = {
    "one token": {"length": 1, "channels": 1, "states": 1},
    "two tokens": {"length": 2, "channels": 3, "states": 16, "routes": 2},
    "a block less one": {"length": 63, "channels": 17, "states": 8, "routes": 6},
    "a block": {"length": 64, "channels": 8, "states": 1, "routes": 2, "merge": "none"},
    "a block and one": {"length": 65, "channels": 96, "states": 4},
    "two blocks less one": {"length": 127, "channels": 17, "states": 3, "routes": 6, "merge": "none"},
    "long": {"length": 1000, "channels": 17, "states": 16, "routes": 2},
    "long, one state": {"length": 1000, "channels": 96, "states": 1, "routes": 6},
    "64 states": {"length": 127, "channels": 8, "states": 64, "routes": 2},
    "15 states": {"length": 70, "channels": 33, "states": 15},
    "one channel": {"length": 127, "channels": 1, "states": 8, "routes": 6},
    "no D, no bias": {"length": 100, "channels": 17, "states": 4, "routes": 2, "plain": True},
    "three samples": {"batch": 3, "length": 65, "channels": 8, "states": 4, "routes": 2},
    "resets": {"length": 200, "channels": 17, "states": 8, "routes": 6, "resets": 0.1},
    "a reset at every token": {"length": 130, "channels": 3, "states": 4, "routes": 2, "resets": 1.0},
    "masked": {"batch": 2, "length": 200, "channels": 17, "states": 16, "routes": 6, "mask": 0.5},
    "masked, apart": {"batch": 2, "length": 130, "channels": 8, "routes": 2, "mask": 0.5, "merge": "none"},
    "nearly all masked": {"length": 1000, "channels": 8, "states": 4, "routes": 2, "mask": 0.98},
    "all masked": {"length": 130, "channels": 8, "states": 4, "routes": 2, "mask": 2.0},
    "masked with resets": {
        "batch": 2, "length": 300, "channels": 17, "states": 3, "routes": 6, "mask": 0.7, "resets": 0.1,
    },
    "issue's lengths": {"length": 4096, "channels": 17, "states": 4, "routes": 2},
    "eight routes": {"length": 127, "channels": 33, "states": 8, "routes": 8},
    "twelve routes": {"batch": 2, "length": 65, "channels": 17, "states": 16, "routes": 12},
    "final state": {"batch": 2, "length": 130, "channels": 17, "states": 5, "routes": 3, "final": True},
    "final state, one token": {"length": 1, "channels": 3, "states": 16, "routes": 2, "final": True},
    "final state, masked with resets": {
        "length": 200, "channels": 17, "states": 3, "routes": 6, "mask": 0.7, "resets": 0.1, "final": True,
    },
    "rank 1": {"length": 65, "channels": 17, "states": 4, "routes": 2, "rank": 1},
    "rank 6": {"batch": 2, "length": 130, "channels": 96, "states": 16, "routes": 6, "rank": 6},
    "rank 31, masked": {"length": 130, "channels": 33, "states": 1, "routes": 2, "rank": 31, "mask": 0.5},
    "rank 40, no bias": {"length": 64, "channels": 8, "states": 4, "rank": 40, "plain": True, "merge": "none"},
    "one head": {"length": 130, "channels": 40, "states": 16, "routes": 2, "heads": 1},
    "heads of a vector": {"batch": 2, "length": 200, "channels": 96, "states": 16, "routes": 6, "heads": 6},
    "heads of two vectors": {"length": 127, "channels": 96, "states": 64, "heads": 3, "final": True},
    "heads across vectors": {"length": 130, "channels": 72, "states": 7, "routes": 3, "heads": 3, "merge": "none"},
    "a head per channel": {"length": 100, "channels": 33, "states": 4, "routes": 2, "heads": 33},
    "heads, masked with resets": {
        "batch": 2, "length": 300, "channels": 40, "states": 3, "routes": 6, "heads": 5, "mask": 0.7, "resets": 0.1,
    },
    "heads, low rank": {"length": 130, "channels": 36, "states": 4, "routes": 2, "heads": 4, "rank": 2, "mask": 0.3},
    "heads, no bias": {"length": 65, "channels": 24, "states": 2, "heads": 4, "plain": True},
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition(name, dtype, nan_outputs):
    case = make(**CASES[name]).to(dtype)
    assert_close(case.run(), case.expect(), dtype)


@pytest.mark.parametrize("rate", [1e-4, 1e3])
@pytest.mark.parametrize("dt", [0.0, 1e-6, 1.0, 30.0, 100.0])
def test_extreme_steps_and_decays_stay_exact(dt, rate):
    # Short enough for float32: one rounding of a decay that is the same at every step adds up over its memory.
    case = replace(make(length=40, channels=17, states=3, routes=2, plain=True), dt_softplus=False)
    case = replace(case, dt=torch.full_like(case.dt, dt), A=torch.full_like(case.A, -rate)).to(torch.float32)
    assert_close(case.run(), case.expect(), torch.float32)


@pytest.mark.parametrize("raw", [-30.0, -20.0, -7.0, 0.0, 19.9, 20.1, 90.0])
def test_softplus_is_accurate_far_from_zero(raw):
    case = make(length=130, channels=17, states=2, plain=True)
    case = replace(case, dt=raw + 0.1 * case.dt, A=case.A / (1 + abs(raw))).to(torch.float32)
    assert_close(case.run(), case.expect(), torch.float32)


def test_a_long_slow_decay_drifts_no_more_than_torch_in_float32():
    case = replace(make(length=2048, channels=16, states=2, plain=True), dt_softplus=False)
    case = replace(case, x=case.x.abs(), B=case.B.abs(), dt=case.dt.abs() * 0.02, A=case.A / 20)
    case = case.to(torch.float32)
    expected, _ = loop(case.to(torch.float64))

    def error(y: Tensor) -> float:
        return ((y.double() - expected).norm() / expected.norm()).item()

    y = native.forward(case)[0]
    assert error(y) <= 1.5 * error(loop(case)[0])


@pytest.mark.parametrize("product", [-1e3, -1e7, -1e20, -3e38, -math.inf])
def test_a_huge_decay_forgets_everything_and_is_not_nan(product):
    case = replace(make(length=70, channels=17, states=3, plain=True), dt_softplus=False)
    case = replace(case, dt=torch.ones_like(case.dt), A=torch.full_like(case.A, product)).to(torch.float32)
    y = native.forward(case)[0]
    alone = replace(case, starts=torch.ones(1, 70, dtype=torch.bool))
    assert torch.equal(y, native.forward(alone)[0])


def test_growing_states_are_right_until_they_overflow_to_infinity():
    case = replace(make(length=20, channels=17, states=2, plain=True), dt_softplus=False)
    case = replace(case, dt=torch.ones_like(case.dt), A=-0.1 * case.A).to(torch.float32)
    assert_close(case.run(), case.expect(), torch.float32)
    case = replace(case, A=torch.full_like(case.A, 80.0), x=case.x.abs(), B=case.B.abs(), C=case.C.abs())
    y = native.forward(case)[0]
    assert bool((y[0, case.order[0, 2:].long()] == math.inf).all())


def test_a_nan_in_the_volume_gives_nan_and_only_where_it_reaches():
    case = make(length=200, channels=17, states=3).to(torch.float32)
    at = int(case.order[0, 100])
    x = case.x.clone()
    x[0, at, 5] = math.nan
    y = native.forward(replace(case, x=x))[0]
    clean = native.forward(case)[0]
    order = case.order[0].long()
    assert bool(y[0, order[100:], 5].isnan().all())
    y[0, order[100:], 5] = clean[0, order[100:], 5]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("kind", [{}, {"heads": 2}, {"rank": 3}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_found_wherever_it_stands(kind, value):
    case = make(batch=2, length=130, channels=18, states=3, routes=2, **kind).to(torch.float32)
    for sample, token, route in ((0, 0, 0), (1, 129, 1), (0, 64, 1)):
        dt = case.dt.clone()
        dt[sample, token, route, -1] = value
        if kind.get("rank"):
            case = replace(case, dt_weight=case.dt_weight.abs())
        with pytest.raises(ValueError, match=rf"sample {sample}, token {token}, route {route}, .*: (nan|inf)"):
            native.forward(replace(case, dt=dt))
        hidden = torch.ones(2, 130, dtype=torch.bool)
        hidden[sample, token] = False
        native.forward(replace(case, dt=dt, dt_mask=hidden))


def test_a_negative_step_is_found():
    case = make(length=70, plain=True).to(torch.float32)
    case = replace(case, dt=case.dt.abs(), dt_softplus=False)
    native.forward(case)
    dt = case.dt.clone()
    dt[0, 69, 0, 7] = -1e-3
    with pytest.raises(ValueError, match=r"token 69, route 0, channel 7: -0\.001"):
        native.forward(replace(case, dt=dt))


def test_what_masked_tokens_hold_is_never_read():
    case = make(batch=2, length=200, channels=17, states=5, routes=2, mask=0.5, resets=0.05).to(torch.float32)
    poisoned = {}
    for name in ("x", "dt", "B", "C"):
        tensor = getattr(case, name).clone()
        tensor[~case.dt_mask] = math.nan
        poisoned[name] = tensor
    got = replace(case, **poisoned).run()
    assert_same_bits(got, case.run())
    for name in ("y", "x", "dt", "B", "C"):
        assert bool((got[name][~case.dt_mask] == 0).all()), name


def test_masking_equals_cutting_the_tokens_out():
    case = make(length=200, channels=17, states=5, mask=0.5).to(torch.float32)
    kept = case.dt_mask[0]
    number = torch.cumsum(kept, 0) - 1
    order = number[case.order[0].long()][kept[case.order[0].long()]].int().unsqueeze(0)
    cut = {name: getattr(case, name)[:, kept] for name in ("x", "dt", "B", "C")}
    short = replace(case, **cut, dt_mask=None, order=order)
    y = native.forward(case)[0]
    torch.testing.assert_close(y[:, kept], native.forward(short)[0])


def test_strides_do_not_matter():
    case = make(batch=2, length=130, channels=17, states=5, routes=3, mask=0.2).to(torch.float32)
    both = torch.cat([case.B, case.C, case.dt], dim=-1)  # one projection, read in place
    B, C, dt = both.split([5, 5, 17], dim=-1)
    spread = replace(case, B=B, C=C, dt=dt, x=case.x.mT.contiguous().mT, A=case.A.mT.contiguous().mT)
    assert not any(t.is_contiguous() for t in (spread.B, spread.C, spread.dt, spread.x, spread.A))
    assert_same_bits(spread.run(), case.run())


def test_gradients_accept_expanded_and_transposed_cotangents():
    for merge in ("sum", "none"):
        case = make(length=70, channels=8, routes=2, merge=merge).to(torch.float32)
        y, states, _ = native.forward(case)
        for dy in (torch.ones(()).expand_as(y), torch.randn_like(y.mT.contiguous()).mT):
            strided = native.backward(case, dy, None, states)
            plain = native.backward(case, dy.contiguous(), None, states)
            pairs = zip(strided[:-1], plain[:-1], strict=True)  # the last belongs to the weights of a low rank
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    case = make(length=130, channels=17, states=5, routes=2).to(dtype)
    assert_same_bits(case.run(), case.to(torch.float32).run())


@pytest.mark.parametrize("kind", [{}, {"rank": 3}, {"heads": 2}], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("channels", [16, 80])
def test_any_number_of_threads_gives_the_same_bits(threads, batch, channels, kind):
    length = (6000 if channels == 80 else 20000) * (3 if kind else 1) // batch
    case = make(batch, length, channels, states=5, routes=3, mask=0.1, resets=0.01, final=True, **kind)
    case = case.to(torch.float32)
    threads(1)
    expected = case.run()
    for count in (1, 2, 3, 7):
        threads(count)
        assert_same_bits(case.run(), expected)


def test_calls_from_several_python_threads_do_not_disturb_one_another():
    cases = [make(length=500, channels=17, states=5, routes=2, seed=s).to(torch.float32) for s in range(4)]
    expected = [case.run() for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(Case.run, cases * 4), expected * 4, strict=True):
            assert_same_bits(got, want)


def test_a_call_leaves_the_floating_point_mode_as_it_was():
    make().to(torch.float32).run()
    tiny = torch.full((4,), 1e-40)
    assert bool((tiny * 0.5 > 0).all())


def test_inference_saves_no_states():
    case = make(length=130).to(torch.float32)
    y, states, _ = native.forward(case, save_states=False)
    assert states.numel() == 0
    assert torch.equal(y, native.forward(case)[0])
    with pytest.raises(ValueError, match="run forward with save_states=True"):
        native.backward(case, torch.ones_like(y), None, states)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}, {"channels": 0}], ids=str)
def test_empty_axes_give_empty_results_and_zero_parameter_gradients(empty, nan_outputs):
    got = make(**{"batch": 1, "length": 5, "channels": 3, "routes": 2} | empty).to(torch.float32).run()
    assert all(bool((value == 0).all()) for value in got.values())


def _with_index(case: Case, value: int) -> Tensor:
    order = case.order.clone()
    order[0, 3] = value
    return order


WRONG = {
    "an index beyond the volume": (lambda c: {"order": _with_index(c, 65)}, ValueError, "outside 0..L-1"),
    "a negative index": (lambda c: {"order": _with_index(c, -1)}, ValueError, "outside 0..L-1"),
    "an order of int64": (lambda c: {"order": c.order.long()}, TypeError, "order has dtype torch.int64"),
    "a short order": (lambda c: {"order": c.order[:, :9]}, ValueError, r"order has shape \(1, 9\)"),
    "a strided order": (lambda c: {"order": c.order.repeat(1, 2)[:, ::2]}, ValueError, "must be contiguous"),
    "starts of integers": (lambda c: {"starts": c.order}, TypeError, "starts has dtype torch.int32"),
    "a mask of floats": (lambda c: {"dt_mask": torch.ones(1, 65)}, TypeError, "dt_mask has dtype"),
    "a mask of another size": (
        lambda c: {"dt_mask": torch.ones(1, 6, dtype=torch.bool)}, ValueError, r"dt_mask has shape \(1, 6\)",
    ),
    "dt of two routes": (lambda c: {"dt": c.dt.repeat(1, 1, 2, 1)}, ValueError, "dt has shape"),
    "A of other channels": (lambda c: {"A": c.A[:, :5]}, ValueError, r"A has shape \(1, 5, 4\)"),
    "B of other states": (lambda c: {"B": c.B[..., :3]}, ValueError, "A has shape"),
    "C of other states": (lambda c: {"C": c.C[..., :3]}, ValueError, "C has shape"),
    "C on the meta device": (lambda c: {"C": c.C.to("meta")}, ValueError, "C is on meta"),
    "D of one axis": (lambda c: {"D": c.D[0]}, ValueError, r"D has shape \(8,\)"),
    "x of two axes": (lambda c: {"x": c.x[0]}, ValueError, r"expected \(Bt, L, Ch\)"),
    "no state": (
        lambda c: {"A": c.A[..., :0], "B": c.B[..., :0], "C": c.C[..., :0]}, native.NativeError, "zero where",
    ),
    "heads that do not divide": (lambda c: {"A": c.A[:, :3, 0]}, ValueError, "A has 3 heads, which must divide the 8"),
    "weights of other channels": (
        lambda c: {"dt_weight": c.A[:, :5, :2]}, ValueError, "dt has shape",
    ),
    "an unknown merge": (lambda c: {"merge": "mean"}, ValueError, "merge is 'mean'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise_and_are_named(name):
    change, error, message = WRONG[name]
    case = make()
    case = replace(case, **change(case))
    with pytest.raises(error, match=message):
        native.forward(case)


def test_gradients_of_another_shape_raise():
    case = make()
    y, states, final = native.forward(replace(case, final_state=True))
    with pytest.raises(ValueError, match="dy has shape"):
        native.backward(case, y[:, :-1], None, states)
    with pytest.raises(ValueError, match="dfinal has shape"):
        native.backward(case, y, final[:, :, :-1], states)


BROKEN = {
    "another version of the struct": ({"struct_size": 8}, 1),
    "a negative batch": ({"batch": -1}, 2),
    "no route": ({"routes": 0}, 2),
    "sizes beyond 64 bits": ({"batch": 2**31, "length": 2**31 - 1, "channels": 2**31}, 2),
    "more tokens than int32 counts": ({"length": 2**31}, 2),
    "heads that do not divide the channels": ({"heads": 3}, 2),
    "heads and a rank": ({"heads": 2, "rank": 2}, 2),
    "a rank without weights": ({"rank": 2}, 4),
    "an unknown dtype": ({"dtype": 7}, 3),
    "an unknown merge": ({"merge": 2}, 3),
    "no thread": ({"threads": 0}, 3),
    "no x": ({"x": None}, 4),
    "no y": ({"y": None}, 4),
    "no order": ({"order": None}, 4),
    "a misaligned A": ({"A": 4097}, 4),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_library_answers_a_broken_call_with_a_status(name):
    case = make().to(torch.float32)
    call = native._Call(case)
    call.empty("y", 1, 65, 8)
    library = native._library()
    assert library.medmamba_scan_forward(ctypes.byref(call.scan)) == 0
    fields_of_call, status = BROKEN[name]
    for field, value in fields_of_call.items():
        setattr(call.scan, field, value)
    assert library.medmamba_scan_forward(ctypes.byref(call.scan)) == status
    assert library.medmamba_scan_forward(None) == 1
    text = library.medmamba_status_text(status).decode()
    assert text
    assert text != library.medmamba_status_text(-1).decode()


def test_scratch_memory_that_cannot_be_had_is_an_error():
    # 2^40 channels: sizes fit in 64 bits, the scratch does not fit in any machine; nothing is read before.
    case = make(length=1).to(torch.float32)
    call = native._Call(case)
    call.empty("y", 1, 1, 8)
    call.scan.channels = 2**44
    assert native._library().medmamba_scan_forward(ctypes.byref(call.scan)) == native.OUT_OF_MEMORY


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 64, 6, 17, 16), (3, 1000, 4, 96, 5)], ids=str)
def test_python_and_library_agree_on_the_size_of_the_states(sizes):
    batch, length, routes, channels, states = sizes
    scan = native._Scan(ctypes.sizeof(native._Scan), batch, length, channels, routes, states, threads=1)
    size = native._library().medmamba_scan_checkpoint_size(ctypes.byref(scan))
    assert size == math.prod(native.states_shape(batch, length, routes, channels, states, "cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the ELF dynamic linker")
def test_the_library_brings_no_visible_cpp_runtime_beside_that_of_torch():
    library = native._library()
    assert hasattr(library, "medmamba_scan_forward")
    for name in ("__cxa_throw", "_Znwm", "_ZSt9terminatev"):
        assert not hasattr(library, name), name


# --- other instruction sets and sanitizers, each in a process of its own -------------------------------------------


CHILD = "MEDMAMBA_TEST_NATIVE_CHILD"  # set in the processes below: they start no further ones


def run_tests(selection: str, timeout: int, **environment: str) -> subprocess.CompletedProcess:
    if CHILD in os.environ:
        pytest.skip("this is a child process already")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-k", selection]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, CHILD: "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def instruction_sets() -> list[str]:
    """What this machine can run, from the kernel's own list of CPU features."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = ["baseline"]
    if "avx2" in flags and "fma" in flags:
        names.append("avx2")
    if all(f"avx512{part}" in flags for part in ("f", "dq", "bw", "vl")):
        names.append("avx512")
    return names


def test_the_best_instruction_set_is_chosen_unless_one_is_forced():
    assert native.isa() == (os.environ.get("MEDMAMBA_NATIVE_ISA") or instruction_sets()[-1])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_definition(isa):
    if isa == native.isa():
        pytest.skip(f"{isa} is what this process tests already")
    if isa not in instruction_sets():
        pytest.skip(f"this CPU does not have {isa}")
    done = run_tests("equal_the_definition or forced or extreme", 300, MEDMAMBA_NATIVE_ISA=isa)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_an_unknown_instruction_set_is_refused_with_a_reason():
    code = (
        "import torch; from medmamba_kernels.backends import native; "
        "print(native.unavailable_reason(torch.device('cpu')))"
    )
    environment = {**os.environ, "MEDMAMBA_NATIVE_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MEDMAMBA_NATIVE_ISA=mmx names an instruction set")


def test_reasons_why_the_library_cannot_be_used(monkeypatch, tmp_path):
    assert "computes on the CPU" in native.unavailable_reason(torch.device("meta"))
    (tmp_path / "broken.so").write_bytes(b"no library")
    for path, reason in ((tmp_path / "absent.so", "cannot be loaded"), (tmp_path / "broken.so", "cannot be loaded")):
        monkeypatch.setenv("MEDMAMBA_NATIVE_LIBRARY", str(path))
        native._load.cache_clear()
        assert reason in native.unavailable_reason(torch.device("cpu"))
        with pytest.raises(native.NativeError, match="the native back end cannot run"):
            native.isa()
    monkeypatch.delenv("MEDMAMBA_NATIVE_LIBRARY")
    monkeypatch.setattr(native, "LIBRARY_NAMES", ("nothing.so",))
    native._load.cache_clear()
    assert "without its compiled library" in native.unavailable_reason(torch.device("cpu"))
    native._load.cache_clear()


@pytest.mark.nightly
def test_the_sanitizers_find_nothing(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("needs cmake and a C++ compiler")
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{compiler} comes without libasan.so")
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-DMEDMAMBA_SANITIZE=ON"]
    for command in (configure, ["cmake", "--build", tmp_path]):
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
    for isa in instruction_sets():
        done = run_tests(
            # Not the test that asks for more memory than there is: the sanitizer's allocator aborts.
            "not instruction and not sanitizers and not reasons and not scratch and not runtime",
            1200,
            MEDMAMBA_NATIVE_LIBRARY=str(tmp_path / "_native.so"),
            MEDMAMBA_NATIVE_ISA=isa,
            LD_PRELOAD=runtime,
            # Python and torch keep memory to the end; only what our library does counts.
            ASAN_OPTIONS="detect_leaks=0:abort_on_error=1",
            UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_own_threads_and_the_threads_of_torch_give_the_same_bits(threads):
    """In a child, because the choice is made when the library is loaded."""
    program = (
        "import sys, torch\n"
        "from medmamba_kernels.backends import native\n"
        "from medmamba_kernels.testing import make_problem\n"
        "torch.set_num_threads(2)\n"
        "p = make_problem((8, 9, 10), channels=64, state_size=16, batch=2, dtype=torch.float32)\n"
        "result = p.run_with_gradients('native', {'y': torch.ones_like(p.x)})\n"
        "print(native._share_openmp(native._library()) if sys.argv[1] == 'torch' else True)\n"
        "print({name: value.double().sum().item().hex() for name, value in result.items()})\n"
    )
    results = []
    for kind in ("own", "torch"):
        environment = {**os.environ, "MEDMAMBA_NATIVE_THREADS": kind}
        child = subprocess.run(
            [sys.executable, "-c", program, kind], env=environment, capture_output=True, text=True, check=True
        )
        results.append(child.stdout.splitlines())
    assert results[0][1] == results[1][1]
    if sys.platform == "linux":
        assert results[1][0] == "True", (
            "torch's OpenMP runtime was not found; the library falls back to its own threads"
        )


def test_a_team_that_openmp_cannot_provide_runs_on_own_threads(threads):
    """OMP_THREAD_LIMIT=1 gives teams of one; members that wait for each other must not start there."""
    program = (
        "import torch\n"
        "from medmamba_kernels.testing import check_against_reference, make_problem\n"
        "torch.set_num_threads(2)\n"
        "p = make_problem((8, 9, 10), channels=64, state_size=16, batch=1)\n"
        "check_against_reference(p, 'native', torch.float32)\n"
        "print('done')\n"
    )
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    child = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert child.stdout.strip() == "done"
