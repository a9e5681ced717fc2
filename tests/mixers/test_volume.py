"""Tokens as a volume: views both ways, in the memory format in which convolutions are fast."""

from __future__ import annotations

import pytest
import torch

from medmamba.mixers import get_core
from medmamba.mixers.volume import TokenConv, as_tokens, as_volume

GRID = (3, 4, 5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_volume_is_a_view_of_its_tokens_with_channels_last_in_memory(batch):
    u = torch.randn(batch, 60, 6)
    volume = as_volume(u, GRID, 3)
    assert volume.data_ptr() == u.data_ptr()
    # Strides alone tell torch the format; for one sample it is the batch stride that gets lost on other ways.
    assert volume.stride() == (360, 1, 120, 30, 6)
    token = (1 * 4 + 2) * 5 + 3
    assert torch.equal(volume[:, :, 1, 2, 3], u[:, token])
    assert torch.equal(as_tokens(volume), u)
    assert as_tokens(volume).data_ptr() == u.data_ptr()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_convolution_of_tokens_answers_in_the_same_format(batch):
    u = torch.randn(batch, 60, 6)
    y = TokenConv(6, (3, 3, 3), bias=True)(u, GRID)
    assert y.stride() == u.stride()
    core = get_core("dwconv")(6, d_state=4, dt_rank=1, routes="raster6")
    assert core.conv(as_volume(u, GRID, 3)).stride() == as_volume(u, GRID, 3).stride()


def test_an_image_has_two_axes():
    u = torch.randn(2, 20, 6)
    assert as_volume(u, (1, 4, 5), 2).shape == (2, 6, 4, 5)
    assert torch.equal(as_tokens(as_volume(u, (1, 4, 5), 2)), u)
