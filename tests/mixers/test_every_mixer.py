"""What every mixer must do (medmamba/mixers/laws), over the registry, for blocks alone; networks: tests/networks."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import medmamba.presets
from medmamba.mixers.laws import MIXER_LAWS
from medmamba.presets import MIXERS, get_mixer

EVERY_CASE = [
    pytest.param(name, law, case, id="-".join((name, law.name, case)))
    for name in MIXERS
    for law in MIXER_LAWS
    for case in law.cases
]


@pytest.mark.parametrize(("name", "law", "case"), EVERY_CASE)
def test_a_mixer_keeps_the_law(name, law, case):
    law.check(MIXERS[name].block, case)


@pytest.mark.parametrize("name", MIXERS)
def test_it_says_what_is_theirs_and_what_is_ours(name):
    spec = MIXERS[name]
    assert spec.name == name
    assert spec.title.isalnum()
    assert spec.title.lower() == name
    assert spec.source.link.startswith("https://arxiv.org/abs/")
    for texts in (spec.theirs, spec.changes):
        assert texts
        assert all(text == text.strip() and not text.endswith(".") for text in texts)
    assert len({spec.title for spec in MIXERS.values()}) == len(MIXERS)


def test_a_mixer_is_one_file_and_one_line_of_the_registry():
    files = {path.stem for path in Path(medmamba.presets.__file__).parent.glob("*.py")} - {"__init__", "spec"}
    assert files == set(MIXERS)
    for name in files:
        assert importlib.import_module(f"medmamba.presets.{name}").SPEC is MIXERS[name]


def test_nothing_that_builds_blocks_or_networks_knows_a_mixer_by_name():
    package = Path(medmamba.presets.__file__).parents[1]
    texts = {
        path: path.read_text()
        for folder in ("layers", "mixers", "networks", "nnunet", "inference")
        for path in (package / folder).rglob("*.py")
    }
    known = [(str(path), name) for path, text in texts.items() for name in MIXERS if f'"{name}"' in text]
    assert known == []


def test_an_unknown_mixer_names_the_known_ones():
    with pytest.raises(KeyError, match=r"no mixer 'vim'; known: .*vim3d"):
        get_mixer("vim")
