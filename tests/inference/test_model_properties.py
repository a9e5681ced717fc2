"""Laws of a package under any single change: a flipped bit, a changed value, with and without new seals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from medmamba.inference.model import Model, ModelRefused, load_model
from medmamba.inference.model.values import parse_json

FILES = ("model.json", "fold_0.safetensors", "fold_1.safetensors", "MODEL_CARD.md", "SHA256SUMS")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10)
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e-320, 1e308])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["", "..", "/", "\x1b[2J", "torch.nn.ReLU", "torch.nn.Conv2d", "SAR", "file", "all", "0", "2d"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def loaded(folder: Path) -> Model | ModelRefused:
    """The model, or why it is refused; any other exception fails the test."""
    try:
        return load_model(folder)
    except ModelRefused as error:
        return error


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of keys to every value, the mappings and lists too."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def mutations(draw: st.DrawFn) -> Any:
    """A function that makes one change to the content of a model.json: replaces, removes, adds or doubles a value."""
    number, value = draw(st.integers(0, 10**6)), draw(VALUES)
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap"]))

    def change(content: Any) -> None:
        paths = list(places(content))
        *parents, last = paths[number % len(paths)]
        for key in parents:
            content = content[key]
        if kind == "replace":
            content[last] = value
        elif kind == "remove":
            del content[last]
        elif kind == "add" and isinstance(content, dict):
            content["added"] = value
        elif kind == "add":
            content.append(value)
        elif isinstance(content, dict):
            content[last] = next(iter(content.values()))
        else:
            content.reverse()

    return change


@examples(200)
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_refused(file, place, bit, package, tmp_path_factory):
    folder = Path(shutil.copytree(package, tmp_path_factory.mktemp("flipped") / "model"))
    content = bytearray((folder / file).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (folder / file).write_bytes(content)
    with pytest.raises(ModelRefused):
        load_model(folder)
    shutil.rmtree(folder)


@examples(60)
@given(change=mutations())
def test_a_changed_value_is_refused_also_with_new_checksums(change, package, tmp_path_factory, reseal):
    """Whoever changes model.json and SHA256SUMS has still not changed the weights, which name their model.json."""
    folder = Path(shutil.copytree(package, tmp_path_factory.mktemp("changed") / "model"))
    content = json.loads((folder / "model.json").read_text())
    change(content)
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.raises(ModelRefused):
        load_model(folder)
    reseal(folder)
    with pytest.raises(ModelRefused):
        load_model(folder)
    (folder / "model.json").write_bytes((package / "model.json").read_bytes())
    reseal(folder)
    assert load_model(folder).id == load_model(package).id
    shutil.rmtree(folder)


@examples(100)
@given(change=mutations())
def test_a_changed_value_with_every_seal_renewed_is_refused_or_means_what_it_says(
    change, package, tmp_path_factory, change_model
):
    """A package made anew around a changed value: never another exception, never a part of it left out or replaced."""
    folder = Path(shutil.copytree(package, tmp_path_factory.mktemp("renewed") / "model"))
    try:
        change_model(folder, change)
    except ValueError:
        return  # no JSON, as a number of 400 digits
    content = json.loads((folder / "model.json").read_text())
    model = loaded(folder)
    if isinstance(model, ModelRefused):
        assert str(model).isprintable()
        return
    assert model.plans == content["plans"]
    assert model.dataset_json == content["dataset"]
    assert list(model.folds) == list(content["epochs"])
    assert model.outputs.num_heads == 3
    assert sorted(model.labels) == [0, 1, 2]
    for fold in model.folds:
        weights, stored = model.network(fold).state_dict(), load_file(folder / f"fold_{fold}.safetensors")
        assert all(torch.equal(weights[key], tensor) for key, tensor in stored.items())
    shutil.rmtree(folder)


@given(content=st.binary(max_size=60) | VALUES.map(lambda value: repr(value).encode("utf-8", "replace")))
def test_any_bytes_are_json_or_refused(content):
    value = problem = None
    try:
        value = parse_json(content, "model.json")
    except ModelRefused as error:
        problem = error
    assert json.loads(json.dumps(value)) == value if problem is None else problem.code == "MM-MD-007"
