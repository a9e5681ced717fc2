"""Stored volumes, their crops, and a manifest that survives what happens to files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmamba.command import CommandError
from medmamba_pretrain.corpus.crops import Crop, CropReader
from medmamba_pretrain.corpus.record import Record
from medmamba_pretrain.corpus.settings import Settings
from medmamba_pretrain.corpus.store import MANIFEST, Store
from medmamba_pretrain.corpus.summary import verify
from medmamba_pretrain.corpus.volume import DamagedVolumeError, content_hash, open_volume, write_volume

SHAPE = (140, 37, 50)  # more than one chunk, and blocks that do not fill it


def add(store: Store, values: np.ndarray, source: str, patient: str = "p") -> str:
    volume = content_hash(values)
    size = write_volume(store.volume_path(volume), values)
    store.append(Record(source, "1", "accepted", volume=volume, patient=patient, shape=values.shape, size_bytes=size))
    return volume


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).integers(-1024, 3072, SHAPE).astype(np.int16)


@pytest.fixture(scope="module")
def store(tmp_path_factory, values) -> Store:
    store = Store.create(tmp_path_factory.mktemp("store"), Settings())
    add(store, values, "a", "first")
    add(store, values[:20, :20, :20].copy(), "b", "second")
    add(store, values[20:40, :20, :20].copy(), "c", "second")
    return store


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_crop_is_the_slice_of_the_whole(store, values, data):
    start = [data.draw(st.integers(0, size - 1)) for size in SHAPE]
    size = [data.draw(st.integers(1, whole - at)) for at, whole in zip(start, SHAPE, strict=True)]
    found = open_volume(store.folder, content_hash(values)).crop(start, size)
    assert np.array_equal(found, values[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))])
    assert found.dtype == np.int16


@pytest.mark.parametrize(("start", "size"), [((-1, 0, 0), (1, 1, 1)), ((0, 0, 0), (141, 1, 1)), ((0, 0, 0), (0, 1, 1))])
def test_a_crop_outside_of_the_volume_is_an_error(store, values, start, size):
    with pytest.raises(ValueError, match="leaves the volume"):
        open_volume(store.folder, content_hash(values)).crop(start, size)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.tuples(*[st.integers(-30, 160)] * 3), size=st.tuples(*[st.integers(1, 60)] * 3))
def test_beyond_the_borders_the_nearest_voxels_are_repeated(store, values, start, size):
    crop = CropReader(store.folder, size).read(Crop(content_hash(values), start))
    nearest = [np.clip(np.arange(a, a + n), 0, whole - 1) for a, n, whole in zip(start, size, SHAPE, strict=True)]
    assert np.array_equal(crop, values[np.ix_(*nearest)])


def test_drawn_crops_lie_inside_or_around_and_reach_all_places(store, values):
    reader = CropReader(store.folder, (24, 36, 49), {content_hash(values): 1.0})
    crops = [reader.draw(np.random.default_rng(seed)) for seed in range(400)]
    starts = np.array([crop.start for crop in crops])
    assert starts.min(0).tolist() == [0, 0, 0]
    assert starts.max(0).tolist() == [SHAPE[0] - 24, 1, 1]
    assert np.unique(starts[:, 0]).size > 80
    small = CropReader(store.folder, (24, 24, 24), {content_hash(values[:20, :20, :20]): 1.0})
    assert small.draw(np.random.default_rng(0)).start == (-2, -2, -2)


@pytest.mark.parametrize(
    ("weights", "share_of_first"), [("volume", 1 / 3), ("patient", 1 / 2), ("voxels", 259000 / (259000 + 16000))]
)
def test_volumes_are_drawn_by_their_weight(store, values, weights, share_of_first):
    reader = CropReader(store.folder, (8, 8, 8), weights)
    assert dict(zip(reader.ids, reader.probabilities, strict=True))[content_hash(values)] == pytest.approx(
        share_of_first
    )


@pytest.mark.parametrize("weights", [{}, {"0" * 32: 1.0}, "equal"])
def test_weights_that_leave_nothing_are_an_error(store, weights):
    with pytest.raises(ValueError, match="weight"):
        CropReader(store.folder, (8, 8, 8), weights)


def test_the_hash_tells_shape_and_every_voxel_apart(values):
    changed = values.copy()
    changed[7, 7, 7] += 1
    hashes = {content_hash(values), content_hash(changed), content_hash(values.reshape(37, 140, 50))}
    assert len(hashes) == 3
    assert content_hash(np.asfortranarray(values)) == content_hash(values)


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "swap"])
def test_verify_names_a_damaged_volume(tmp_path, values, damage):
    store = Store.create(tmp_path, Settings())
    first, second = add(store, values, "a"), add(store, values[:20].copy(), "b")
    path = store.volume_path(first)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(store.volume_path(second).read_bytes())
    results = dict(verify(store))
    assert results[first].startswith("a: ")
    assert results[second] == ""


def test_verify_names_a_file_without_record(tmp_path, values):
    store = Store.create(tmp_path, Settings())
    volume = content_hash(values)
    write_volume(store.volume_path(volume), values)
    assert "in no record" in dict(verify(store))[volume]


def test_a_missing_volume_says_so(tmp_path):
    with pytest.raises(DamagedVolumeError, match="cannot be opened"):
        open_volume(tmp_path, "0" * 32)


@pytest.mark.parametrize(
    "record",
    [
        Record("a/b.nii.gz", "1-2", "rejected", "not-hu", "values from 0 to 1"),
        Record("ü/ \n.nii", "1", "accepted", volume="0" * 32, shape=(1, 2, 3), affine=((1.0, 0.0), (0.0, 1.0)),
               spacing_mm=(1.5, 1.5, 1.5), intensity={"mean": 1.5}, notes=("odd",), size_bytes=7),
    ],
)  # fmt: skip
def test_a_record_comes_back_from_the_manifest(tmp_path, record):
    Store.create(tmp_path, Settings()).append(record)
    assert list(Store(tmp_path).records.values()) == [record]


def test_every_cut_of_the_manifest_keeps_the_complete_records(tmp_path):
    """Whatever a kill leaves of the last line, the records before it are there, and writing goes on after them."""
    store = Store.create(tmp_path / "whole", Settings())
    for name in "abc":
        store.append(Record(name, "1", "rejected", "format", "é"))
    whole = (tmp_path / "whole" / MANIFEST).read_bytes()
    header = whole.index(b"\n") + 1
    for cut in range(header, len(whole) + 1):
        (tmp_path / MANIFEST).write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n") - 1
        store = Store(tmp_path)
        assert list(store.records) == list("abc")[:complete]
        with store.writing():
            store.append(Record("d", "1", "rejected", "format", "later"))
        assert list(Store(tmp_path).records) == [*"abc"[:complete], "d"]
        assert Store(tmp_path).torn == 0


def test_a_broken_line_in_the_middle_costs_its_record_only(tmp_path):
    store = Store.create(tmp_path, Settings())
    for name in "abc":
        store.append(Record(name, "1", "rejected", "format", "x"))
    lines = (tmp_path / MANIFEST).read_bytes().split(b"\n")
    for broken in (bytes(40), b"[1]", b'{"source": "b"}', b'{"sourc'):
        (tmp_path / MANIFEST).write_bytes(b"\n".join([*lines[:2], broken, *lines[3:]]))
        store = Store(tmp_path)
        assert list(store.records) == ["a", "c"]
        assert store.torn == 1


@pytest.mark.parametrize(
    "content", ["", "{}\n", "hello\n", json.dumps({"format": "medmamba corpus", "version": 99}) + "\n"]
)
def test_a_foreign_manifest_is_refused_and_kept(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CommandError, match="no corpus manifest"):
        Store.create(tmp_path, Settings())
    assert (tmp_path / MANIFEST).read_text() == content


def test_other_settings_are_refused(tmp_path):
    Store.create(tmp_path, Settings())
    with pytest.raises(CommandError, match="was made with"):
        Store.create(tmp_path, Settings(modality="mr"))


def test_one_writer_at_a_time(tmp_path):
    first, second = Store.create(tmp_path, Settings()), Store(tmp_path)
    with first.writing(), pytest.raises(CommandError, match="another process"), second.writing():
        pass
    with second.writing():
        pass
