"""The normalised NC-SSD core against a sum over tokens in float64, and the law that the published form breaks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medmamba.mixers import NonCausalCore


def make(width: int = 6, *, d_state: int = 3, **options) -> NonCausalCore:
    torch.manual_seed(0)
    core = NonCausalCore(width, d_state=d_state, dt_rank=1, routes="raster6", **options).double()
    with torch.no_grad():
        core.D.add_(torch.randn_like(core.D))
    return core


def tokens(grid, width: int = 6, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, math.prod(grid), width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def convolved(core, v: torch.Tensor, grid) -> torch.Tensor:
    """The depthwise convolution tap by tap, zeros around the grid: (L, c) of one sample."""
    weight = core.local.conv.weight
    weight = weight.view(len(weight), *(1,) * (5 - weight.dim()), *weight.shape[2:])
    centre = [size // 2 for size in weight.shape[1:]]
    result = core.local.conv.bias.repeat(len(v), 1)
    places = [torch.unravel_index(torch.tensor(i), grid) for i in range(len(v))]
    index = {tuple(map(int, place)): i for i, place in enumerate(places)}
    for place, i in index.items():
        for tap in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape[1:])).reshape(-1, 3).tolist():
            other = tuple(p + t - c for p, t, c in zip(place, tap, centre, strict=True))
            if other in index:
                result[i] = result[i] + weight[:, tap[0], tap[1], tap[2]] * v[index[other]]
    return result


def by_hand(core: NonCausalCore, u: torch.Tensor, grid, mask: torch.Tensor | None, *, normalised: bool = True):
    """Every pair of tokens: what token j gives to token i of one head is w_j (C_i . B_j) u_j."""
    mask = torch.ones(u.shape[:2]).bool() if mask is None else mask
    per_head = u.shape[-1] // core.heads
    result = torch.zeros_like(u)
    for b in range(u.shape[0]):
        shown = mask[b].unsqueeze(-1)
        B, C = F.silu(convolved(core, core.proj(u[b] * shown), grid)).chunk(2, dim=-1)
        weight = F.softplus(core.dt_proj(u[b]) + core.dt_bias) * shown
        for head in range(core.heads):
            channels = slice(head * per_head, (head + 1) * per_head)
            w = weight[:, head] / weight[:, head].sum() if normalised else weight[:, head]
            result[b, :, channels] = ((C @ B.mT) * w) @ u[b, :, channels] + core.D[head] * u[b, :, channels]
        result[b] *= shown
    return result


@pytest.mark.parametrize(
    ("grid", "kernel_size"),
    [((1, 1, 1), (3, 3, 3)), ((3, 2, 3), (3, 3, 3)), ((3, 4, 1), (1, 3, 3)), ((1, 5, 2), (3, 5))],
    ids=str,
)
@pytest.mark.parametrize("head_width", [2, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_sum_over_all_pairs_of_tokens(grid, kernel_size, head_width, masked):
    core = make(kernel_size=kernel_size, head_width=head_width)
    u = tokens(grid)
    mask = None
    if masked:
        mask = torch.rand(u.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
        mask[:, 0] = True
    torch.testing.assert_close(core(u, grid, mask=mask), by_hand(core, u, grid, mask), rtol=1e-10, atol=1e-10)


def rms(y: torch.Tensor) -> float:
    return y.float().square().mean().sqrt().item()


class Published(NonCausalCore):
    """Without the division by the weight of all tokens."""

    def _weighted(self, u, mask):
        return u * self._per_channel(F.softplus(self.dt_proj(u) + self.dt_bias))


@pytest.mark.parametrize(("kind", "grows"), [(NonCausalCore, False), (Published, True)])
def test_the_magnitude_does_not_depend_on_the_number_of_tokens_but_does_in_the_published_form(kind, grows):
    torch.manual_seed(0)
    core = kind(16, d_state=16, dt_rank=1, routes="raster6")
    torch.nn.init.zeros_(core.D)
    sizes = []
    with torch.no_grad():
        for grid in ((4, 7, 7), (12, 12, 12), (48, 48, 48)):  # from 196 tokens to 564 times as many
            sizes.append(rms(core(tokens(grid, 16, batch=1).float(), grid)))
    ratio = max(sizes) / min(sizes)
    assert ratio > 300 if grows else ratio < 2  # fewer border voxels, less noise of the mean


def test_the_published_form_of_this_test_is_the_published_operator():
    torch.manual_seed(0)
    core = Published(6, d_state=3, dt_rank=1, routes="raster6").double()
    u = tokens((2, 3, 3))
    expected = by_hand(core, u, (2, 3, 3), None, normalised=False)
    torch.testing.assert_close(core(u, (2, 3, 3)), expected, rtol=1e-10, atol=1e-10)


def test_weights_of_a_patch_count_only_against_each_other():
    """The published decay rate |A| is a factor of a head's weights: it cancels."""
    core = make(head_width=2)
    u = tokens((2, 3, 3))
    share = core._weighted(u, None)
    weight = F.softplus(core.dt_proj(u) + core.dt_bias) * torch.tensor([1.0, 7.0, 16.0])
    expected = u * (weight / weight.sum(1, keepdim=True)).repeat_interleave(2, dim=-1)
    torch.testing.assert_close(share, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_holds_a_large_volume():
    core = make().to(torch.float16)
    u = 4 + tokens((24, 24, 24), batch=1)
    y = core(u.half(), (24, 24, 24))
    assert y.dtype == torch.float16
    expected = core.double()(u, (24, 24, 24))
    assert rms(y.double() - expected) < 0.01 * rms(expected)
