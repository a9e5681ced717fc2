"""What is masked is not seen: laws over every registered network, and of the parts, in float64 where numbers count."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medmamba.layers import FeedForward, InstanceGroupNorm, LargeKernelExpand, PatchMerge
from medmamba.mixers import CONTROLS, CORES, GatedFusion, MultiHeadCore, get_core
from medmamba.mixers.mamba import MambaDirection
from medmamba.networks import NETWORKS, create_network
from medmamba_kernels import resolve_routes
from medmamba_kernels.routes import route_table
from medmamba_pretrain.fill import FILLS, get_fill
from medmamba_pretrain.loss import reconstruction_loss
from medmamba_pretrain.masking import (
    MaskedEncoder,
    Visible,
    draw_units,
    fill_masked,
    mask_at,
    masked_copy,
    takes_mask,
    unit_grid,
)

#: Strides that differ per axis and units that are odd in number.
PLANS = {
    ("native", "volume"): ([[1, 1, 1], [1, 2, 2], [2, 2, 2]], (3, 3, 2)),
    ("native", "image"): ([[1, 1], [2, 2], [1, 2]], (5, 3)),
    ("faithful", "volume"): ([[1, 1, 1], [1, 4, 4], [2, 2, 2]], (3, 2, 3)),
    ("faithful", "image"): ([[1, 1], [4, 4], [1, 2]], (5, 3)),
}
OTHERS = sorted(set(CORES) - {"scan", *CONTROLS})
NETWORK_CASES = [(name, *plan) for name in NETWORKS for plan in PLANS]
MODE_CASES = [
    (*case, mode) for case in NETWORK_CASES for mode in (["scan", *CONTROLS] if NETWORKS[case[0]].has_scans else [None])
]
#: What else may stand in the place of the scan, in one network.
MODE_CASES += [("vmunet", "native", kind, mode) for kind in ("volume", "image") for mode in OTHERS]
every_network = pytest.mark.parametrize(("name", "geometry", "kind"), NETWORK_CASES)
every_mode = pytest.mark.parametrize(("name", "geometry", "kind", "mode"), MODE_CASES)
GRID = (2, 3, 4)
WITHIN_UNITS = (PatchMerge, nn.MaxPool2d, nn.MaxPool3d)


def tiny(name, geometry, kind, mode=None, **options):
    """A masked encoder, an image of two samples, and units of which each sample sees another number."""
    torch.manual_seed(0)
    strides, units = PLANS[geometry, kind]
    scans = {"d_state": 2} if NETWORKS[name].has_scans else {}
    options = {**scans, **({"ssm_mode": mode} if mode else {}), **options}
    network = create_network(name, 2, 3, strides=strides, geometry=geometry, base_features=4, depths=1, **options)
    with torch.no_grad():
        for parameter in network.parameters():  # biases and norms away from their neutral initial values
            parameter.add_(0.1 * torch.randn_like(parameter))
    image = torch.randn(2, 2, *[n * s for n, s in zip(units, network.total_stride, strict=True)])
    visible = draw_units(2, units, 0.6)
    visible[1] |= draw_units(1, units, 0.7)[0]
    assert visible[0].sum() != visible[1].sum()
    return MaskedEncoder(network.encoder, network.total_stride), image, visible


def behind(image, visible, noise):
    """The image with something else in its masked voxels."""
    return torch.where(mask_at(visible, image.shape[2:]).unsqueeze(1), image, noise)


def noises(image):
    return [1e6 * torch.randn_like(image), torch.full_like(image, math.inf), torch.full_like(image, math.nan)]


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def run(encoder, image, visible):
    torch.manual_seed(1)  # of stochastic depth
    return encoder(image, visible).features


def mixing_modules(encoder):
    """Modules of an encoder that look from one unit to another, without what is inside of them."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.InstanceNorm2d, nn.InstanceNorm3d)

    def walk(module):
        if takes_mask(module) or (
            isinstance(module, kinds) and getattr(module, "kernel_size", 0) not in [(1,) * 2, (1,) * 3]
        ):
            yield module
        else:
            for child in module.children():
                yield from walk(child)

    return list(walk(encoder))


def positions_of(module, inputs, units):
    """The mask of a module's input, ready to be broadcast."""
    if takes_mask(module):
        return Visible(units).tokens(inputs[1]).unsqueeze(-1)
    if isinstance(module, PatchMerge):
        return mask_at(units, inputs[0].shape[1:-1]).unsqueeze(-1)
    return mask_at(units, inputs[0].shape[2:]).unsqueeze(1)


# No leak (L1, L2)


@every_mode
def test_noise_behind_the_mask_changes_no_bit_at_any_scale(name, geometry, kind, mode):
    encoder, image, visible = tiny(name, geometry, kind, mode)
    for training in (True, False):
        encoder.train(training)
        expected = run(encoder, image, visible)
        for noise in noises(image):
            assert same_bits(run(encoder, behind(image, visible, noise), visible), expected)
        moved = run(encoder, image + 1, visible)
        assert not any(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


@every_mode
def test_noise_behind_the_mask_inside_the_network_changes_no_bit(name, geometry, kind, mode):
    """The image is masked before the stem, so only this test sees whether a layer reads what is behind the mask."""
    encoder, image, visible = tiny(name, geometry, kind, mode)
    expected = run(encoder.eval(), image, visible)
    for noise in (1e6, math.inf, math.nan):
        count = 0

        def disturb(module, inputs, noise=noise):
            nonlocal count
            count += 1
            return torch.where(positions_of(module, inputs, visible), inputs[0], noise), *inputs[1:]

        # Patch merging and pooling need no rule: their windows lie within units.
        joining = [module for module in encoder.modules() if isinstance(module, WITHIN_UNITS)]
        hooks = [module.register_forward_pre_hook(disturb) for module in mixing_modules(encoder) + joining]
        assert same_bits(run(encoder, image, visible), expected)
        assert count == len(hooks) > 2
        for hook in hooks:
            hook.remove()


@every_network
def test_masked_positions_are_zero_at_every_scale_and_behind_every_layer_that_mixes(name, geometry, kind):
    encoder, image, visible = tiny(name, geometry, kind)

    def check(module, inputs, output):
        shown = positions_of(module, (output, *inputs[1:]), visible)
        assert not output.masked_select(~shown).any()
        assert output.masked_select(shown).any()

    for module in mixing_modules(encoder):
        module.register_forward_hook(check)
    features, masks = encoder(image, visible)
    assert len(features) == len(masks) >= 3
    for feature, mask in zip(features, masks, strict=True):
        assert torch.equal(mask, mask_at(visible, feature.shape[2:]))
        assert not feature.movedim(1, -1)[~mask].any()
        assert feature.movedim(1, -1)[mask].any(-1).all()


@every_network
def test_no_gradient_reaches_masked_voxels_and_no_nan_the_weights(name, geometry, kind):
    encoder, image, visible = tiny(name, geometry, kind)
    gradients = []
    for noise in (torch.zeros_like(image), *noises(image)):
        x = behind(image, visible, noise).requires_grad_()
        encoder.zero_grad()
        features = run(encoder, x, visible)
        generator = torch.Generator().manual_seed(2)
        sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features).backward()
        shown = mask_at(visible, image.shape[2:]).unsqueeze(1).expand_as(image)
        assert not x.grad[~shown].any()
        assert x.grad[shown].all()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(g.isfinite().all() for g in gradients[0])
    for other in gradients[1:]:
        assert same_bits(other, gradients[0])


@every_network
def test_no_leak_in_bfloat16(name, geometry, kind):
    encoder, image, visible = tiny(name, geometry, kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(encoder, image, visible)
        assert all(f.isfinite().all() for f in expected)
        for noise in noises(image):
            assert same_bits(run(encoder, behind(image, visible, noise), visible), expected)


@pytest.mark.parametrize("fill", FILLS)
def test_a_training_step_changes_nothing_behind_the_mask_but_the_target(fill):
    """Encoder, fill per scale, a prediction, the loss: all that depends on masked voxels is what is to be predicted."""
    encoder, image, visible = tiny("vmunet", "native", "volume")

    def step(x):
        torch.manual_seed(1)
        masked = encoder(x, visible)
        filled = [fill_masked(get_fill(fill)(f.shape[1]), f, v) for f, v in zip(*masked, strict=True)]
        return filled[0][:, :2] + sum(F.interpolate(f[:, :2], size=x.shape[2:]) for f in filled[1:])

    expected = step(image)
    for noise in noises(image):
        assert torch.equal(step(behind(image, visible, noise)), expected)
    losses = [reconstruction_loss(expected, x, visible) for x in (image, behind(image, visible, noises(image)[0]))]
    assert all(loss.isfinite() for loss in losses)
    assert losses[0] != losses[1]


# The masked encoder is the encoder (L5), its calls are independent


@every_mode
def test_with_everything_visible_it_is_the_encoder(name, geometry, kind, mode):
    encoder, image, visible = tiny(name, geometry, kind, mode)
    everything = torch.ones_like(visible)
    for training in (True, False):
        encoder.train(training)
        torch.manual_seed(1)
        plain = encoder.encoder(image)
        assert same_bits(run(encoder, image, everything), plain)
    encoder.double()
    plain = encoder.encoder(image.double())
    ruled = masked_copy(encoder.encoder, Visible(everything))(image.double())
    for ours, theirs in zip(ruled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_network
def test_samples_of_a_batch_do_not_see_each_other(name, geometry, kind):
    encoder, image, visible = tiny(name, geometry, kind)
    encoder.double().eval()
    together = encoder(image.double(), visible).features
    for i in range(2):
        alone = encoder(image[i : i + 1].double(), visible[i : i + 1]).features
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours[0], theirs[i], rtol=1e-9, atol=1e-9)


@every_network
def test_a_call_leaves_the_encoder_as_it_was(name, geometry, kind):
    encoder, image, visible = tiny(name, geometry, kind)
    encoder.eval()
    before = encoder.encoder(image)
    keys, attributes = list(encoder.state_dict()), [set(vars(m)) for m in encoder.modules()]
    encoder(image, visible)
    failing = mixing_modules(encoder)[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder(image, visible)
    failing.remove()
    assert same_bits(encoder.encoder(image), before)
    assert [set(vars(m)) for m in encoder.modules()] == attributes
    assert list(encoder.state_dict()) == keys == [f"encoder.{key}" for key in encoder.encoder.state_dict()]


@pytest.mark.parametrize("name", ["mednext", "mednextmamba"])
@pytest.mark.parametrize("geometry", ["native", "faithful"])
def test_checkpointed_blocks_are_recomputed_with_the_mask_of_their_call(name, geometry):
    def gradients(style):
        encoder, image, visible = tiny(name, geometry, "volume", checkpoint_style=style)
        two = [encoder(image, visible).features, encoder(image, visible.flip(0)).features]
        sum((f * f).sum() for features in two for f in features).backward()
        return [p.grad for p in encoder.parameters()]

    for ours, theirs in zip(gradients("outside_block"), gradients(None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# Norms (L3)


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm3d(6),
        nn.InstanceNorm3d(6, affine=True),
        nn.GroupNorm(1, 6),
        nn.GroupNorm(3, 6),
        InstanceGroupNorm(6),
    ],
    ids=repr,
)
@pytest.mark.parametrize("training", [True, False])
def test_norms_use_the_statistics_of_the_visible_positions(norm, training):
    torch.manual_seed(0)
    norm = norm.double().train(training)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = 5 + torch.randn(2, 6, 4, 6, 2, dtype=torch.float64)
    units = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool().view(2, 2, 3, 1)
    shown = mask_at(units, x.shape[2:])
    y = masked_copy(norm, Visible(units))(x)
    for sample in range(2):
        gathered = x[sample][:, shown[sample]]  # (C, n)
        expected = norm(gathered[None, :, :, None, None])[0, :, :, 0, 0]
        torch.testing.assert_close(y[sample][:, shown[sample]], expected, rtol=1e-12, atol=1e-12)
        assert not y[sample][:, ~shown[sample]].any()


def test_a_norm_over_a_single_visible_position_is_its_bias():
    norm = nn.InstanceNorm2d(3, affine=True)
    nn.init.normal_(norm.bias)
    units = torch.tensor([[True, False, False]]).view(1, 3, 1)
    y = masked_copy(norm, Visible(units))(torch.randn(1, 3, 3, 1))
    assert torch.equal(y[0, :, 0, 0], norm.bias)


# Convolutions and pooling


@pytest.mark.parametrize("stride", [1, (1, 2, 2)])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_sees_zeros_behind_the_mask(stride, groups):
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 6, 3, stride=stride, padding=1, groups=groups).double()
    units = draw_units(2, (2, 3, 2), 0.5)
    x = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64)
    y = masked_copy(conv, Visible(units))(torch.where(mask_at(units, x.shape[2:]).unsqueeze(1), x, math.nan))
    # The definition: every output is the sum over the visible ones among its neighbours.
    columns = F.pad(x, [1] * 6)
    seen = F.pad(mask_at(units, x.shape[2:]).unsqueeze(1), [1] * 6)
    expected = torch.zeros_like(y) + conv.bias.view(1, -1, 1, 1, 1)
    weight = conv.weight if groups == 1 else torch.block_diag(*conv.weight.flatten(1).split(2)).view(6, 3, 3, 3, 3)
    starts = [range(0, size, s) for size, s in zip(x.shape[2:], conv.stride, strict=True)]
    for d in range(3):
        for h in range(3):
            for w in range(3):
                axes = [torch.tensor([i + k for i in axis]) for axis, k in zip(starts, (d, h, w), strict=True)]
                here = (..., *torch.meshgrid(*axes, indexing="ij"))
                value = torch.einsum("oc,bcdhw->bodhw", weight[..., d, h, w], columns[here].masked_fill(~seen[here], 0))
                expected += value
    shown = mask_at(units, y.shape[2:]).unsqueeze(1)
    torch.testing.assert_close(y, expected * shown, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.BatchNorm3d(4), "use an instance norm"),
        (nn.InstanceNorm3d(4, track_running_stats=True), "track_running_stats=False"),
        (nn.MaxPool3d(3, 2, 1), "straddle"),
        (nn.LayerNorm((4, 4)), "not known"),
        (nn.MultiheadAttention(4, 1), "not known"),
        (nn.Softmax(1), "not known"),
        (FeedForward(4, kernel_size=[3, 3], scales=[3]), "not known"),
        (LargeKernelExpand(4, 4, [2, 2], [3, 3]), "not known"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_without_a_rule_is_refused_by_its_name(module, text):
    with pytest.raises(ValueError, match=text) as refusal:
        MaskedEncoder(nn.Sequential(nn.Identity(), module), (2, 2, 2))
    assert "encoder.1" in str(refusal.value)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d((1, 2), (1, 2)), nn.AvgPool2d(2, (2, 2))], ids=repr)
def test_pooling_that_tiles_is_taken(pool):
    MaskedEncoder(pool, (2, 2))


# Scans (L4)


def scan_by_hand(core, u, mask, grid):
    """One sample: each route's visible tokens one after the other, segment by segment, as if there were no others."""
    result = torch.zeros_like(u)
    table = route_table(core.routes, grid)
    for k in range(len(core.routes)):
        A = -torch.exp(core.A_log[k])
        h = torch.zeros_like(A)
        for step, token in enumerate(table.order[k].tolist()):
            if table.starts is not None and table.starts[k][step]:
                h = torch.zeros_like(A)
            if not mask[token]:
                continue
            if hasattr(core, "x_proj"):
                r, B, C = (core.x_proj[k] @ u[token]).split([core.dt_rank, core.d_state, core.d_state])
                dt = F.softplus(core.dt_proj[k] @ r + core.dt_bias[k])
            else:
                B, C, dt = core.B[k], core.C[k], F.softplus(core.dt_bias[k])
            h = torch.exp(dt[:, None] * A) * h + (dt * u[token])[:, None] * B
            result[token] = result[token] + h @ C + core.D[k] * u[token]
    return result + core.top_up(u) * mask[:, None] if hasattr(core, "top_up") else result


def masked_tokens(grid=GRID, width=5):
    torch.manual_seed(3)
    u = torch.randn(2, math.prod(grid), width, dtype=torch.float64)
    mask = torch.rand(u.shape[:2]) < torch.tensor([[0.3], [0.7]])
    assert mask[0].sum() != mask[1].sum()
    return u, mask


@pytest.mark.parametrize("name", ["scan", "lti", "shuffled", "windowed"])
@pytest.mark.parametrize("routes", [["hwd:reset=5", "dhw:reverse"], ["dhw:hilbert", "dwh:snake"]], ids=str)
def test_a_masked_scan_is_the_compacted_scan(name, routes):
    torch.manual_seed(0)
    core = get_core(name)(5, d_state=2, dt_rank=3, routes=routes).double()
    u, mask = masked_tokens()
    y = core(torch.where(mask.unsqueeze(-1), u, math.nan), GRID, mask=mask)
    expected = torch.stack([scan_by_hand(core, *sample, GRID) for sample in zip(u, mask, strict=True)])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), list(core.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(core.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


BOTH_WAYS = ["dhw", "dhw:reverse"]
IN_LINE = {
    name: partial(get_core(name), 6, d_state=2, dt_rank=1, routes=BOTH_WAYS) for name in ("scan", "lti", "identity")
}
IN_LINE["fused scan"] = partial(IN_LINE["scan"], fusion=GatedFusion(0.0))
IN_LINE["heads"] = partial(MultiHeadCore, 6, core=partial(get_core("scan"), d_state=2), routes=[BOTH_WAYS] * 2)


@pytest.mark.parametrize("name", IN_LINE)
def test_on_a_line_masking_is_cutting_out(name):
    torch.manual_seed(0)
    core = IN_LINE[name]().double()
    u, mask = masked_tokens((1, 1, 24), 6)
    y = core(torch.where(mask.unsqueeze(-1), u, math.nan), (1, 1, 24), mask=mask)
    for ours, tokens, shown in zip(y, u, mask, strict=True):
        expected = core(tokens[shown].unsqueeze(0), (1, 1, int(shown.sum())))[0]
        torch.testing.assert_close(ours[shown], expected, rtol=1e-10, atol=1e-10)
        assert not ours[~shown].any()


def test_a_masked_depthwise_convolution_sees_zeros():
    torch.manual_seed(0)
    core = get_core("dwconv")(5, d_state=4, dt_rank=1, routes="raster6").double()
    u, mask = masked_tokens()
    y = core(torch.where(mask.unsqueeze(-1), u, math.nan), GRID, mask=mask)
    torch.testing.assert_close(y, core(u * mask.unsqueeze(-1), GRID) * mask.unsqueeze(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ["dhw", "hwd:reverse", "dhw:hilbert"])
def test_a_masked_causal_convolution_sees_zeros_and_its_scan_is_compacted(route):
    torch.manual_seed(0)
    (parsed,) = resolve_routes([route])
    direction = MambaDirection(
        5, core=partial(get_core("scan"), d_state=2), dt_rank=1, conv_size=4, route=parsed
    ).double()
    u, mask = masked_tokens()
    y = direction(torch.where(mask.unsqueeze(-1), u, math.nan), GRID, mask=mask)
    tokens = direction.act(direction.convolve(u * mask.unsqueeze(-1), GRID))
    expected = torch.stack([scan_by_hand(direction.core, *sample, GRID) for sample in zip(tokens, mask, strict=True)])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CORES)
def test_every_core_takes_a_mask_and_reads_nothing_behind_it(name):
    core = get_core(name)(5, d_state=4, dt_rank=1, routes="raster6").double()
    assert takes_mask(core)
    u, mask = masked_tokens()
    u.requires_grad_()
    for noise in (1e6, math.nan):
        noisy = torch.where(mask.unsqueeze(-1), u, noise)
        y = core(noisy, GRID, mask=mask)
        assert torch.equal(y, core(u, GRID, mask=mask))
        gradients = torch.autograd.grad(y.sum(), [u, *core.parameters()])
        assert not gradients[0][~mask].any()
        assert all(g.isfinite().all() for g in gradients)
    everything = torch.ones_like(mask)
    torch.testing.assert_close(core(u, GRID, mask=everything), core(u, GRID), rtol=1e-12, atol=1e-12)


# Units (L6)

sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.lists(st.integers(1, 5), min_size=2, max_size=3), st.floats(0, 0.99), st.integers(0, 9))
def test_the_ratio_is_exact_in_every_sample(batch, units, ratio, seed):
    count = math.prod(units)
    if count < 2 and ratio > 0:
        with pytest.raises(ValueError, match="larger patch"):
            draw_units(batch, units, ratio)
        return
    drawn = draw_units(batch, units, ratio, generator=torch.Generator().manual_seed(seed))
    assert drawn.shape == (batch, *units)
    wanted = round(count * (1 - ratio))
    expected = count if ratio == 0 else min(max(wanted, 1), count - 1)
    assert drawn.flatten(1).sum(1).tolist() == [expected] * batch
    assert torch.equal(drawn, draw_units(batch, units, ratio, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 9))
def test_no_stride_joins_visible_with_masked_positions(axes, seed):
    """Axes of (units, stride to the coarsest grid, further stride to a finer one)."""
    units, strides, finer = zip(*axes, strict=True)
    drawn = torch.rand(2, *units, generator=torch.Generator().manual_seed(seed)) < 0.5
    grid = [n * s for n, s in zip(units, strides, strict=True)]
    fine = [n * s for n, s in zip(grid, finer, strict=True)]
    assert unit_grid(grid, strides) == units
    for position in range(math.prod(grid)):
        place = torch.unravel_index(torch.tensor(position), grid)
        unit = [int(p) // s for p, s in zip(place, strides, strict=True)]
        assert torch.equal(mask_at(drawn, grid)[(slice(None), *place)], drawn[(slice(None), *unit)])
    # A window of any stride of the network is visible or masked as a whole.
    assert torch.equal(mask_at(drawn, fine), mask_at(mask_at(drawn, grid), fine))


def test_units_are_drawn_uniformly_and_for_each_sample_on_its_own():
    drawn = draw_units(4000, (2, 3), 0.5, generator=torch.Generator().manual_seed(0)).flatten(1)
    assert (drawn.float().mean(0) - 0.5).abs().max() < 0.04  # five standard deviations
    assert len(drawn.unique(dim=0)) == math.comb(6, 3)


def test_processes_with_other_seeds_draw_other_units():
    one, other = (draw_units(1, (6, 6, 6), 0.75, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1))
    assert not torch.equal(one, other)
    assert one.sum() == other.sum() == 54


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: draw_units(1, (2, 2), 1.0), r"in \[0, 1\)"),
        (lambda: draw_units(1, (2, 2), -0.1), r"in \[0, 1\)"),
        (lambda: draw_units(1, (2, 2), 0.5, generator=SimpleNamespace(device=torch.device("cuda"))), "on the CPU"),
        (lambda: unit_grid((16, 30), (4, 4)), "not divisible"),
        (lambda: mask_at(torch.ones(1, 2, 2).bool(), (4, 5)), "multiple"),
        (lambda: mask_at(torch.ones(1, 2, 2).bool(), (4, 4, 4)), "multiple"),
    ],
)
def test_refusals_say_what_to_do(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_units_that_do_not_fit_are_refused():
    encoder, image, visible = tiny("vmunet", "native", "image")
    blind = visible.clone()
    blind[1] = False
    for units, text in ((visible[:1], "units must be"), (visible.float(), "units must be"), (blind, "no visible unit")):
        with pytest.raises(ValueError, match=text):
            encoder(image, units)
    with pytest.raises(ValueError, match="not divisible"):
        encoder(image[..., :-1], visible)


@pytest.mark.parametrize("kind", ["volume", "image"])
def test_features_are_ready_for_a_fill(kind):
    encoder, image, visible = tiny("mednextmamba", "native", kind)
    for feature, shown in zip(*encoder(image, visible), strict=True):
        fill = get_fill("token")(feature.shape[1])
        filled = fill_masked(fill, feature, shown)
        assert filled.shape == feature.shape
        assert torch.equal(filled.movedim(1, -1)[shown], feature.movedim(1, -1)[shown])
        assert (filled.movedim(1, -1)[~shown] == fill.token).all()
