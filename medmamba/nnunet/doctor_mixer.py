"""What ``medmamba doctor --mixer NAME`` examines: what a mixer says of itself, and the laws of cores and mixers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from medmamba.command import CommandError
from medmamba.entry_points import distributions_of
from medmamba.nnunet.doctor import Check
from medmamba.presets import GROUP, MIXERS, MixerSpec, get_mixer

if TYPE_CHECKING:
    from medmamba.mixers.laws import Law


def examine_mixer(name: str) -> Iterator[Check]:
    """Run every check on a mixer, one after the other; none of them raises for what it finds.

    Raises:
        CommandError: no mixer has this name.
    """
    try:
        spec = get_mixer(name)
    except KeyError as error:
        raise CommandError(
            f"{error.args[0]}; if it is in a package of yours, install that (pip install -e FOLDER) and see that its "
            f"pyproject.toml has the entry point in the group {GROUP}"
        ) from error
    except Exception as error:  # a third party's module may fail in any way
        return iter([_cannot_be_loaded(name, error)])
    return _checks(name, spec)


def _cannot_be_loaded(name: str, error: Exception) -> Check:
    theirs = ", ".join(distributions_of(GROUP, name)) or "its package"
    seen = " ".join(f"{type(error).__name__}: {error}".split())
    return Check("fail", f"mixer {name}", seen, f"correct the entry point of {theirs}, or the module that it names")


def _checks(name: str, spec: MixerSpec) -> Iterator[Check]:
    from medmamba.mixers.laws import CORE_LAWS, MIXER_LAWS

    yield _names(name, spec)
    if name in MIXERS and distributions_of(GROUP, name):
        theirs = ", ".join(distributions_of(GROUP, name))
        yield Check("note", f"mixer {name}", f"{theirs} has one of this name, which is not looked at: ours counts")
    cores = yield from _cores(spec)
    for core, build in cores.items():
        yield from (_law(f"core {core}: {law}", law, build) for law in CORE_LAWS)
    yield from (_law(f"mixer: {law}", law, spec.block) for law in MIXER_LAWS)


def _names(name: str, spec: MixerSpec) -> Check:
    line = f"mixer {name}"
    if spec.name != name:
        return Check("fail", line, f"its SPEC has the name {spec.name!r}", "give SPEC and entry point the same name")
    if not (spec.title.isascii() and spec.title.isalnum()):
        remedy = "use letters and digits only: the title is part of names of plans"
        return Check("fail", line, f"its SPEC has the title {spec.title!r}", remedy)
    return Check("ok", line, spec.summary)


def _cores(spec: MixerSpec) -> Generator[Check, None, dict[str, Callable[..., Any]]]:
    """The cores of all places by name, with their options; a failing line where they are not to be had."""
    from medmamba.mixers import get_core
    from medmamba.mixers.block import BlockOptions
    from medmamba.mixers.laws.blocks import PLACES

    found: dict[str, Callable[..., Any]] = {}
    try:
        options = BlockOptions.from_mapping(spec.block)
        for place in PLACES.values():
            here = options.at(place)
            if here.core is not None:
                found.setdefault(here.core, here.core_at(place, get_core(here.core), is_own=True))
    except Exception as error:  # so may their core
        seen = str(error.args[0]) if isinstance(error, KeyError) and error.args else f"{type(error).__name__}: {error}"
        yield Check(
            "fail", "options of the block", " ".join(seen.split()), "correct `block` of SPEC, or install the core"
        )
    return found


def _law(line: str, law: Law, subject: Any) -> Check:
    from medmamba.mixers.laws import LawBroken

    try:
        law.check(subject)
    except LawBroken as broken:
        return Check("fail", line, str(broken), law.remedy)
    return Check("ok", line, law.says)
