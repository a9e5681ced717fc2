"""``medmamba doctor --mixer``: sound mixers pass, and a broken one gets a failing line with a remedy."""

from __future__ import annotations

import re

import pytest

from medmamba.cli import main
from medmamba.mixers import laws
from medmamba.mixers.laws import CORE_LAWS, MIXER_LAWS

MODULE = """
    import torch
    from torch import nn

    from medmamba.mixers import IdentityCore
    from medmamba.presets import MixerSpec, Source

    class SoundCore(IdentityCore):
        def forward(self, u, grid, *, mask=None):
            return super().forward(1.0 * u, grid, mask=mask)

    class SummingCore(IdentityCore):
        def forward(self, u, grid, *, mask=None):
            u = super().forward(u, grid, mask=mask)
            return super().forward(u + u.sum(1, keepdim=True), grid, mask=mask)

    def spec(name, title="Theirs", **block):
        return MixerSpec(name, title, Source("", "", 2026, ""), "one line", ("",), ("",), block=block)

    SOUND = spec("sound3d", core="sound", deepest={"core": "identity"})
    SUMS = spec("sums3d", core="summing", norm=False)
    RENAMED = spec("another")
    TITLED = spec("titled3d", title="The Mixer")
    COLOURED = spec("coloured3d", colour="red")
    CORELESS = spec("coreless3d", core="nowhere")
    TEXT = "a text"
"""
ENTRY_POINTS = """
    [medmamba.mixers]
    sound3d = their_mixers:SOUND
    sums3d = their_mixers:SUMS
    renamed3d = their_mixers:RENAMED
    titled3d = their_mixers:TITLED
    coloured3d = their_mixers:COLOURED
    coreless3d = their_mixers:CORELESS
    text3d = their_mixers:TEXT
    gone3d = their_mixers_that_are_gone:SPEC
    vim3d = their_mixers:SOUND

    [medmamba.cores]
    sound = their_mixers:SoundCore
    summing = their_mixers:SummingCore
"""


@pytest.fixture(autouse=True)
def _theirs(add_distribution) -> None:
    add_distribution("their-mixers", ENTRY_POINTS, their_mixers=MODULE)


@pytest.fixture
def few_laws(monkeypatch) -> None:
    """One law of each kind, where the lines around them are the point."""
    monkeypatch.setattr(laws, "CORE_LAWS", [law for law in CORE_LAWS if law.name == "magnitude"])
    monkeypatch.setattr(laws, "MIXER_LAWS", [law for law in MIXER_LAWS if law.name == "patch size"])


def lines(capsys, name: str, exit_code: int) -> list[str]:
    assert main(["doctor", "--mixer", name]) == exit_code
    return capsys.readouterr().out.splitlines()


def test_a_sound_mixer_of_another_package_passes(capsys):
    found = lines(capsys, "sound3d", 0)
    names = [line[6:].split("  ")[0] for line in found if line.startswith("ok")]
    expected = ["mixer sound3d"]
    expected += [f"core {core}: {law.name}" for core in ("sound", "identity") for law in CORE_LAWS]
    assert names == expected + [f"mixer: {law.name}" for law in MIXER_LAWS]
    assert found[-1] == "all required checks passed"


@pytest.mark.usefixtures("few_laws")
def test_a_broken_law_fails_with_what_was_seen_and_the_remedy(capsys):
    found = lines(capsys, "sums3d", 1)
    (place,) = [i for i, line in enumerate(found) if line.startswith("fail  core summing: magnitude")]
    assert "rms of the result on 4, 8 and 16 voxels per axis" in found[place]
    assert found[place + 1].split() == ["->", *CORE_LAWS[4].remedy.split()]
    assert any(line.startswith("fail  mixer: patch size") for line in found)
    assert found[-1] == "2 of 3 checks failed"


@pytest.mark.usefixtures("few_laws")
@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("renamed3d", "its SPEC has the name 'another'"),
        ("titled3d", "its SPEC has the title 'The Mixer'"),
        ("coloured3d", "a block has no option colour"),
        ("coreless3d", "no ssm_mode 'nowhere'; known: .*summing"),
        ("text3d", "entry point medmamba.mixers: text3d leads to a str"),
        ("gone3d", "ModuleNotFoundError: No module named 'their_mixers_that_are_gone'"),
    ],
)
def test_what_a_mixer_says_of_itself_is_checked(name, seen, capsys):
    found = lines(capsys, name, 1)
    first = next(i for i, line in enumerate(found) if line.startswith("fail"))
    assert re.search(seen, found[first])
    assert found[first + 1].lstrip().startswith("->")


@pytest.mark.usefixtures("few_laws")
def test_a_mixer_of_ours_is_checked_and_one_behind_it_mentioned(capsys):
    found = lines(capsys, "vim3d", 0)
    assert any(line.startswith("note") and "their-mixers 1.0" in line for line in found)
    assert any(line.startswith("ok    core scan: magnitude") for line in found)


def test_an_unknown_mixer_is_wrong_usage(capsys):
    assert main(["doctor", "--mixer", "nothing3d"]) == 2
    message = capsys.readouterr().err
    assert "no mixer 'nothing3d'; known: " in message
    assert "medmamba.mixers" in message
