"""Strips of rows: a bound on memory that changes no bit of the result, only the time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.inference.predictor import strips
from medmamba.inference.predictor.resample import AxisMap, resample_slabs
from medmamba.inference.predictor.strips import divide_rows
from medmamba.inference.predictor.window import predict_slabs

TILE = (4, 6, 5)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(4, 9), st.integers(6, 20), st.integers(5, 12)),
    target_rows=st.integers(2, 30),
    count=st.integers(1, 5),
    step=st.sampled_from([0.5, 0.75, 1.0]),
)
def test_strips_are_the_volume_to_the_bit(shape, target_rows, count, step):
    generator = torch.Generator().manual_seed(0)
    image, kernel = torch.randn(1, *shape, generator=generator), torch.randn(3, 1, 3, 3, 3, generator=generator)

    def forward(x):
        return torch.nn.functional.conv3d(x, kernel, padding=1)

    maps = [AxisMap.linear(shape[0], 7), AxisMap.linear(shape[1], target_rows), AxisMap.linear(shape[2], 6)]

    def predicted(divisions):
        result = torch.full((3, 7, target_rows, 6), torch.nan)
        for wanted, needed in divisions:
            slabs = predict_slabs(image, forward, tile=TILE, step=step, classes=3, rows=needed)
            part = result[:, :, wanted]
            for plane, rows, logits in resample_slabs(slabs, (maps[0], maps[1].part(wanted)[1], maps[2])):
                part[:, plane, rows] = logits
        return result

    whole = predicted(strips._strips(maps[1], 1))
    assert torch.equal(predicted(strips._strips(maps[1], min(count, target_rows))), whole)
    assert not whole.isnan().any()


@given(
    size=st.integers(1, 300),
    target=st.integers(1, 400),
    most_rows=st.integers(1, 300),
    tile_rows=st.integers(1, 64),
)
def test_strips_cover_every_row_once_and_fit(size, target, most_rows, tile_rows):
    rows = AxisMap.linear(size, target)
    thinnest = max(2, tile_rows // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "resident_bytes", lambda: 0)
        if most_rows < thinnest:
            with pytest.raises(MemoryError, match="at least"):
                divide_rows(rows, tile_rows, 10, most_rows * 20)
            return
        found = divide_rows(rows, tile_rows, 10, most_rows * 20)
    assert [row for wanted, _ in found for row in range(wanted.start, wanted.stop)] == list(range(target))
    assert all(needed.stop - needed.start <= most_rows for _, needed in found)


def test_a_volume_that_fits_is_one_strip(monkeypatch):
    monkeypatch.setattr(strips, "resident_bytes", lambda: 10**9)
    rows = AxisMap.linear(100, 100)
    assert len(divide_rows(rows, 32, 10**6, 10**9 + 2 * 100 * 10**6)) == 1
    assert len(divide_rows(rows, 32, 10**6, 10**9 + 2 * 99 * 10**6)) == 2


def test_without_a_bound_too_little_memory_is_no_refusal(monkeypatch):
    monkeypatch.setattr(strips, "available_bytes", lambda: 0)
    found = divide_rows(AxisMap.linear(100, 100), 32, 10**9)
    assert max(needed.stop - needed.start for _, needed in found) <= 16


@pytest.mark.parametrize(("divisions", "rows_of_tiles"), [(1, 7), (2, 8), (3, 11)])
def test_a_border_costs_at_most_two_rows_of_tiles(divisions, rows_of_tiles):
    """512 rows, tiles of 128 at a step of 0.5: 7 rows of tiles; a border between two tiles' starts costs two."""
    calls = 0

    def forward(x):
        nonlocal calls
        calls += 1
        return x

    image, rows = torch.zeros(1, 1, 512, 1), AxisMap.linear(512, 512)
    for _, needed in strips._strips(rows, divisions):
        list(predict_slabs(image, forward, tile=(1, 128, 1), step=0.5, classes=1, rows=needed))
    assert calls == rows_of_tiles
