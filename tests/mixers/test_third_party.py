"""Mixers and cores of other distributions: found by entry point, never for one of ours, usable wherever ours are."""

from __future__ import annotations

import pytest
import torch

from medmamba.entry_points import distributions_of
from medmamba.mixers import CORES, get_core
from medmamba.networks import create_network
from medmamba.presets import MIXERS, get_mixer

MODULE = """
    from medmamba.mixers.identity import IdentityCore
    from medmamba.presets import MixerSpec, Source

    class ScaledCore(IdentityCore):
        def __init__(self, width, *, factor=1.0, **common):
            super().__init__(width, **common)
            self.factor = factor

        def forward(self, u, grid, *, mask=None):
            return self.factor * super().forward(u, grid, mask=mask)

    class Other:
        pass

    def function(width):
        return ScaledCore(width)

    SPEC = MixerSpec(
        name="theirs3d",
        title="Theirs3D",
        source=Source("", "", 2026, ""),
        summary="one line",
        theirs=("all",),
        changes=("nothing",),
        block={"core": "scaled", "core_options": {"factor": 3.0}},
    )
    TEXT = "a text"
"""
ENTRY_POINTS = """
    [medmamba.mixers]
    theirs3d = their_mixers:SPEC
    text3d = their_mixers:TEXT
    gone3d = their_mixers_that_are_gone:SPEC
    vim3d = their_mixers:SPEC

    [medmamba.cores]
    scaled = their_mixers:ScaledCore
    function = their_mixers:function
    other = their_mixers:Other
    scan = their_mixers:ScaledCore
"""


@pytest.fixture(autouse=True)
def _theirs(add_distribution) -> None:
    """Mixers and cores of another distribution, which tries to replace two of ours."""
    add_distribution("their-mixers", ENTRY_POINTS, their_mixers=MODULE)


def test_a_mixer_and_its_core_are_found_by_name():
    assert get_mixer("theirs3d").title == "Theirs3D"
    assert get_core("scaled").__name__ == "ScaledCore"
    assert distributions_of("medmamba.mixers", "theirs3d") == ["their-mixers 1.0"]


def test_a_name_of_ours_is_ours():
    assert get_mixer("vim3d") is MIXERS["vim3d"]
    assert get_core("scan") is CORES["scan"]


@pytest.mark.parametrize(("get", "name"), [(get_mixer, "vim"), (get_core, "scann")], ids=["mixer", "core"])
def test_an_unknown_name_lists_ours_and_theirs(get, name):
    with pytest.raises(KeyError, match=rf"no (mixer|ssm_mode) '{name}'; known: .*(scaled, scan|theirs3d, .*vim3d)"):
        get(name)


@pytest.mark.parametrize(
    ("get", "name", "found"),
    [
        (get_mixer, "text3d", "medmamba.mixers: text3d leads to a str, not to a MixerSpec"),
        (get_core, "function", "medmamba.cores: function leads to a function, not to a class of torch.nn.Module"),
        (get_core, "other", "medmamba.cores: other leads to Other, not to a class of torch.nn.Module"),
    ],
    ids=["text", "function", "other class"],
)
def test_an_entry_point_that_leads_elsewhere_is_named(get, name, found):
    with pytest.raises(TypeError, match=found):
        get(name)


def small(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_network("vmunet", 1, 2, strides=[[1, 1, 1], [2, 2, 2]], features_per_stage=[4, 8], **options).eval()


def test_a_network_takes_their_mixer_with_the_options_of_its_core():
    network = small(mixer="theirs3d")
    factors = {module.factor for module in network.modules() if type(module).__name__ == "ScaledCore"}
    assert factors == {3.0}
    assert network(torch.randn(1, 1, 8, 8, 8))[0].isfinite().all()


def test_a_mixer_of_ours_takes_their_core_and_a_network_their_ssm_mode():
    of_mixer = small(mixer={"name": "vim3d", "core": "scaled", "parameters": "route", "core_options": {"factor": 5.0}})
    of_network = small(ssm_mode="scaled")
    factors = [
        {module.factor for module in network.modules() if type(module).__name__ == "ScaledCore"}
        for network in (of_mixer, of_network)
    ]
    assert factors == [{5.0}, {1.0}]
