"""Published token mixers as data, one file each. Imports nothing heavy: names of trainers and plans come from here.

A mixer of a third party is an entry point of the group ``medmamba.mixers`` that leads to a :class:`MixerSpec`; a core
of theirs is one of the group ``medmamba.cores`` (:mod:`medmamba.mixers`).
"""

from __future__ import annotations

from medmamba.entry_points import entry

from . import (
    convs5z,
    efficientvim3d,
    effvmamba3d,
    feryolo3d,
    groupmamba3d,
    hrvmamba3d,
    longconv3d,
    mambamil3d,
    mambayolo3d,
    mlfsr3d,
    motionmamba3d,
    msvmamba3d,
    s4nd3d,
    spatialmamba3d,
    vfimamba3d,
    vim3d,
    vmamba3d,
    vssd3d,
)
from .spec import MixerSpec, Source

#: Group of the entry points of third parties.
GROUP = "medmamba.mixers"

MIXERS: dict[str, MixerSpec] = {
    spec.name: spec
    for spec in (
        convs5z.SPEC,
        efficientvim3d.SPEC,
        effvmamba3d.SPEC,
        feryolo3d.SPEC,
        groupmamba3d.SPEC,
        hrvmamba3d.SPEC,
        longconv3d.SPEC,
        mambamil3d.SPEC,
        mambayolo3d.SPEC,
        mlfsr3d.SPEC,
        motionmamba3d.SPEC,
        msvmamba3d.SPEC,
        s4nd3d.SPEC,
        spatialmamba3d.SPEC,
        vfimamba3d.SPEC,
        vim3d.SPEC,
        vmamba3d.SPEC,
        vssd3d.SPEC,
    )
}


def get_mixer(name: str) -> MixerSpec:
    """Registry entry of a mixer, ours or a third party's.

    Raises:
        KeyError: an unknown name; the message lists the known ones.
        TypeError: an entry point that leads to something else.
    """
    return entry(GROUP, name, MIXERS, "mixer", _problem)


def _problem(found: object) -> str:
    return "" if isinstance(found, MixerSpec) else f"a {type(found).__name__}, not to a MixerSpec"


__all__ = ["GROUP", "MIXERS", "MixerSpec", "Source", "get_mixer"]
