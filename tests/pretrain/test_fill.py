"""What fills masked tokens, against loops over samples, gaps and tokens in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba_kernels import resolve_routes
from medmamba_pretrain.fill import FILLS, GatedTOKI, LinearFill, PaperTOKI, TokenFill, get_fill

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "toki_paper_gap.npz"
GRID = (2, 3, 4)
ROUTE_FILLS = [name for name in FILLS if name != "token"]


def make(name, width, **options):
    """A fill in float64 whose parameters are not at their special initial values."""
    torch.manual_seed(0)
    fill = get_fill(name)(width, **options).double()
    with torch.no_grad():
        for parameter in fill.parameters():
            parameter.copy_(torch.randn_like(parameter) / width**0.5)
    return fill


def random_case(seed, batch=3, grid=GRID, width=5, visible=0.4):
    generator = torch.Generator().manual_seed(seed)
    length = math.prod(grid)
    x = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, length, generator=generator) < visible
    mask[torch.arange(batch), torch.randint(length, (batch,), generator=generator)] = True
    return x, mask


def by_loops(fill, x_BLC, visible_BL, grid):
    """The definition: sample by sample, route by route, gap by gap, token by token, powers written out."""
    result = torch.zeros_like(x_BLC)
    for sample, (x, visible) in enumerate(zip(x_BLC, visible_BL, strict=True)):
        for route in fill.routes:
            order = route.order(grid).tolist()
            seen = [i for i, token in enumerate(order) if visible[token]]
            known = {i: x[order[i]] for i in seen}
            known[-1] = x[order[seen[0]]] if fill.ends is None else fill.ends[0]
            known[len(order)] = x[order[seen[-1]]] if fill.ends is None else fill.ends[1]
            stops = [-1, *seen, len(order)]
            for p, q in pairwise(stops):
                for j in range(1, q - p):
                    result[sample, order[p + j]] += in_gap(fill, known[p], known[q], j, q - p)
            for i in seen:
                result[sample, order[i]] += x[order[i]]
    return result / len(fill.routes)


def in_gap(fill, left, right, j, g):
    def s(n, of):
        return (1 - n / of) * left + n / of * right

    if isinstance(fill, LinearFill):
        return s(j, g)
    if isinstance(fill, PaperTOKI):
        return sum(torch.linalg.matrix_power(fill.M, j - n) @ s(n, g + 1) for n in range(j + 1))
    decay = torch.exp(-torch.nn.functional.softplus(fill.theta))
    return decay**j * left + sum(decay ** (j - n) * (1 - decay) * s(n, g) for n in range(1, j + 1))


@pytest.mark.parametrize("ends", ["hold", "learned"])
@pytest.mark.parametrize("routes", [["dhw"], "raster6", ["hwd:snake", "whd:reverse"]], ids=str)
@pytest.mark.parametrize("name", ROUTE_FILLS)
def test_values_and_gradients_equal_the_definition(name, routes, ends):
    fill = make(name, 5, routes=routes, ends=ends)
    x, visible = random_case(1)
    inputs = (x.requires_grad_(), *fill.parameters())
    seed = torch.randn_like(x)
    ours, expected = fill(x, visible, GRID), by_loops(fill, x, visible, GRID)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for own, other in zip(
        torch.autograd.grad(ours, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    name=st.sampled_from(ROUTE_FILLS),
    width=st.sampled_from([1, 3, 8]),
    visible=st.floats(0, 1),
)
def test_any_mask_on_any_grid_equals_the_definition(seed, grid, name, width, visible):
    fill = make(name, width, routes=["dhw", "whd:reverse"])
    x, mask = random_case(seed, 2, grid, width, visible)
    torch.testing.assert_close(fill(x, mask, grid), by_loops(fill, x, mask, grid), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gap", range(7))
def test_the_papers_form_equals_its_recurrence_written_down_elsewhere(gap):
    golden = np.load(GOLDEN)
    left, right, M = (torch.from_numpy(golden[name]) for name in ("v_left", "v_right", "M"))
    fill = PaperTOKI(4).double()
    with torch.no_grad():
        fill.M.copy_(M)
    x = torch.full((1, gap + 2, 4), torch.nan, dtype=torch.float64)
    x[0, 0], x[0, -1] = left, right
    visible = torch.tensor([[True, *[False] * gap, True]])
    filled = fill(x, visible, (1, 1, gap + 2))
    torch.testing.assert_close(filled[0, :-1], torch.from_numpy(golden[f"y_id_Q{gap}"]), rtol=1e-12, atol=1e-12)


def as_released(M, left, right, g):
    """Rows 0 ... g - 1 of a gap as the released code computes them, (g, C), derived anew from its formula:

    s_n = (1 - n / (g - 1)) left + n / (g - 1) right,  Y_n = M^(g - 1 - n) s_n,  Z_j = Y_0 + ... + Y_j.
    """
    share = torch.arange(g, dtype=torch.float64) / max(g - 1, 1)
    s = torch.lerp(left, right, share[:, None])
    return torch.stack([torch.linalg.matrix_power(M, g - 1 - n) @ s[n] for n in range(g)]).cumsum(0)


def test_the_released_formula_is_a_recurrence_in_its_last_row_only():
    """Why it is not one of the fills: powers count from the end of the gap, so a token depends on the gap's length."""
    torch.manual_seed(0)
    g, M = 5, 0.4 * torch.randn(3, 3, dtype=torch.float64)
    left, right = torch.randn(2, 3, dtype=torch.float64)
    released = as_released(M, left, right, g)
    h, rows = torch.zeros(3, dtype=torch.float64), []
    for n in range(g):
        h = M @ h + torch.lerp(left, right, torch.tensor(n / (g - 1), dtype=torch.float64))
        rows.append(h)
    torch.testing.assert_close(released[-1], rows[-1], rtol=1e-12, atol=0)
    assert all((ours - theirs).abs().max() > 0.1 for ours, theirs in zip(rows[:-1], released[:-1], strict=True))


def test_where_the_released_formula_is_nothing_the_papers_form_interpolates():
    """At the initial value M = 0: zeros and, in the last masked token, a copy of the right neighbour."""
    left, right = torch.randn(2, 3, dtype=torch.float64)
    released = as_released(torch.zeros(3, 3, dtype=torch.float64), left, right, 4)
    assert torch.equal(released, torch.stack([*[torch.zeros_like(left)] * 3, right]))
    x = torch.stack([left, left, left, left, right])[None]
    ours = PaperTOKI(3).double()(x, torch.tensor([[True, False, False, False, True]]), (1, 1, 5))[0, 1:4]
    shares = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) / 5
    torch.testing.assert_close(ours, torch.lerp(left, right, shares))


def test_closed_forms_of_two_masked_tokens():
    a, b, m = 2.0, -1.0, 0.25
    x, visible = torch.tensor([[[a], [9.0], [9.0], [b]]]).double(), torch.tensor([[True, False, False, True]])
    paper, gated, linear = PaperTOKI(1).double(), GatedTOKI(1).double(), LinearFill(1)
    with torch.no_grad():
        paper.M.fill_(m)
        gated.theta.fill_(math.log(1 / m - 1))
    h1 = m * a + (3 * a + b) / 4
    assert paper(x, visible, (1, 1, 4))[0, 1:3, 0].tolist() == pytest.approx([h1, m * h1 + (2 * a + 2 * b) / 4])
    h1 = m * a + (1 - m) * (2 * a + b) / 3
    expected = [h1, m * h1 + (1 - m) * (a + 2 * b) / 3]
    assert gated(x, visible, (1, 1, 4))[0, 1:3, 0].tolist() == pytest.approx(expected)
    assert linear(x, visible, (1, 1, 4))[0, 1:3, 0].tolist() == pytest.approx([(2 * a + b) / 3, (a + 2 * b) / 3])


@pytest.mark.parametrize("name", FILLS)
def test_visible_tokens_keep_their_bits_and_masked_ones_are_never_read(name):
    fill = make(name, 5).float()
    x, visible = random_case(2)
    x = x.float()
    filled = fill(x, visible, GRID)
    assert torch.equal(filled[visible], x[visible])
    for rubbish in (1e30, torch.nan, torch.inf):
        again = fill(torch.where(visible[..., None], x, rubbish).requires_grad_(), visible, GRID)
        assert torch.equal(again, filled)
        again.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in fill.parameters())


@pytest.mark.parametrize("name", ROUTE_FILLS)
def test_a_token_lands_where_it_belongs(name):
    """Channel 0 holds the place along the only axis: interpolation gives every masked token its own."""
    fill = LinearFill(2, routes=["dhw:reverse", "whd"]) if name == "linear" else make(name, 2)
    x = torch.arange(12.0, dtype=torch.float64)[None, :, None].expand(4, 12, 2)
    visible = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    visible[:, [0, -1]] = True
    filled = fill(x, visible, (1, 1, 12))
    if name == "linear":
        torch.testing.assert_close(filled, x)
    else:
        assert torch.equal(filled[visible], x[visible])
    each = torch.cat([fill(x[i : i + 1], visible[i : i + 1], (1, 1, 12)) for i in range(4)])
    torch.testing.assert_close(filled, each, rtol=1e-12, atol=1e-12)


def test_the_gated_form_lies_between_interpolating_and_holding():
    x, visible = random_case(3)
    linear = LinearFill(5)(x, visible, GRID)
    fill = GatedTOKI(5).double()
    for theta, expected in ((40.0, linear), (-40.0, None)):
        with torch.no_grad():
            fill.theta.fill_(theta)
        filled = fill(x, visible, GRID)
        if expected is None:  # the left neighbour, or the first visible token where there is none
            before = torch.where(visible, torch.arange(24), -1).cummax(1).values
            first = visible.int().argmax(1, keepdim=True)
            held = torch.where(before < 0, first, before)
            expected = x.gather(1, held[..., None].expand(-1, -1, 5))
        torch.testing.assert_close(filled, expected, rtol=1e-9, atol=1e-9)


def test_the_gated_form_keeps_constants_and_stays_between_its_neighbours():
    fill = make("toki", 5)
    _, visible = random_case(4)
    constant = torch.randn(3, 1, 5, dtype=torch.float64).expand(3, 24, 5)
    torch.testing.assert_close(fill(constant, visible, GRID), constant)
    x, visible = random_case(5)
    filled = fill(x, visible, GRID)
    lowest = torch.where(visible[..., None], x, torch.inf).amin(1, keepdim=True)
    highest = torch.where(visible[..., None], x, -torch.inf).amax(1, keepdim=True)
    assert (filled >= lowest - 1e-12).all()
    assert (filled <= highest + 1e-12).all()


def test_the_papers_form_starts_as_interpolation_with_its_weights():
    x, visible = torch.tensor([[[3.0], [0], [0], [6.0]]]), torch.tensor([[True, False, False, True]])
    assert PaperTOKI(1)(x, visible, (1, 1, 4))[0, :, 0].tolist() == pytest.approx([3, 3.75, 4.5, 6])


def test_without_memory_the_way_back_is_the_mirror_image():
    x, visible = random_case(6)
    fill = LinearFill(5)
    there = fill(x, visible, GRID)
    torch.testing.assert_close(fill(x.flip(1), visible.flip(1), GRID).flip(1), there, rtol=1e-12, atol=1e-12)
    back = LinearFill(5, routes=["dhw:reverse"])
    torch.testing.assert_close(back(x, visible, GRID), there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FILLS)
def test_without_a_mask_nothing_changes(name):
    x, visible = random_case(7)
    assert torch.equal(make(name, 5)(x, torch.ones_like(visible), GRID), x)


@pytest.mark.parametrize("ends", ["hold", "learned"])
@pytest.mark.parametrize("where", [0, 5, 23])
@pytest.mark.parametrize("name", ROUTE_FILLS)
def test_one_visible_token_fills_the_volume(name, where, ends):
    fill = make(name, 5, ends=ends)
    x, _ = random_case(8)
    visible = torch.zeros(3, 24, dtype=torch.bool)
    visible[:, where] = True
    filled = fill(x, visible, GRID)
    torch.testing.assert_close(filled, by_loops(fill, x, visible, GRID), rtol=1e-9, atol=1e-9)
    if ends == "hold" and name != "toki-paper":
        torch.testing.assert_close(filled, x[:, where : where + 1].expand_as(x))


def test_gradients_reach_the_two_neighbours_and_nothing_else():
    fill = make("toki", 1)
    x = torch.randn(1, 9, 1, dtype=torch.float64, requires_grad=True)
    visible = torch.tensor([[True, True, False, False, False, True, False, True, True]])
    (gradient,) = torch.autograd.grad(fill(x, visible, (1, 1, 9))[0, 3, 0], x, retain_graph=True)
    assert gradient[0, :, 0].nonzero().flatten().tolist() == [1, 5]
    assert torch.autograd.grad(fill(x, visible, (1, 1, 9))[0, 3, 0], fill.theta)[0].abs().min() > 0


@pytest.mark.parametrize("name", FILLS)
def test_gradients_pass_gradcheck(name):
    fill = make(name, 2)
    x, visible = random_case(9, 2, (1, 3, 4), 2)
    assert torch.autograd.gradcheck(lambda x: fill(x, visible, (1, 3, 4)), x.requires_grad_())


def test_routes_are_averaged():
    x, visible = random_case(10)
    routes = resolve_routes("raster6")
    each = [LinearFill(5, routes=[str(route)])(x, visible, GRID) for route in routes]
    together = LinearFill(5, routes="raster6")(x, visible, GRID)
    torch.testing.assert_close(together, torch.stack(each).mean(0), rtol=1e-12, atol=1e-12)


def test_a_fill_of_a_long_gap_takes_a_number_of_products_that_grows_as_its_logarithm():
    products = 0

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal products
            products += function in (torch.Tensor.matmul, torch.Tensor.__matmul__)
            return function(*args, **(kwargs or {}))

    fill = make("toki-paper", 2)
    visible = torch.zeros(1, 1000, dtype=torch.bool)
    visible[0, 0] = True
    with Counting():
        fill(torch.randn(1, 1000, 2).double(), visible, (10, 10, 10))
    assert 0 < products <= 20


@pytest.mark.parametrize(
    ("x", "visible", "grid", "message"),
    [
        ((2, 24, 5), torch.ones(2, 24), GRID, "a bool mask"),
        ((2, 24, 5), torch.ones(1, 24, dtype=torch.bool), GRID, "a bool mask"),
        ((2, 24, 5), torch.ones(2, 24, dtype=torch.bool), (2, 3, 5), "does not have 24 tokens"),
        ((2, 24, 5), torch.tensor([[True] * 24, [False] * 24]), GRID, "no visible token"),
    ],
    ids=["dtype", "batch", "grid", "empty"],
)
@pytest.mark.parametrize("name", FILLS)
def test_what_does_not_fit_is_refused(name, x, visible, grid, message):
    with pytest.raises(ValueError, match=message):
        get_fill(name)(5)(torch.zeros(x), visible, grid)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(KeyError, match="no fill 'toky'; known: token, linear, toki, toki-paper"):
        get_fill("toky")
    with pytest.raises(ValueError, match="unknown ends 'zero'; known: hold, learned"):
        LinearFill(3, ends="zero")


def test_the_learned_token_is_the_same_everywhere():
    fill = TokenFill(5)
    x, visible = random_case(11)
    filled = fill(x.float(), visible, GRID)
    assert torch.equal(filled[~visible], fill.token.expand(int((~visible).sum()), 5))
