"""What the project says about a mixer: paper, what is theirs, what we changed, and its block as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where a mixer comes from.

    Attributes:
        title: of the paper.
        authors: first author and "et al.".
        year: of the first version.
        link: to the paper.
        code: ``owner/name`` of the released code, or empty.
    """

    title: str
    authors: str
    year: int
    link: str
    code: str = ""


@dataclass(frozen=True)
class MixerSpec:
    """One entry of the registry of mixers.

    Attributes:
        name: as in ``--mixer NAME`` and in plans files.
        title: its spelling inside names of trainers and plans, letters and digits only.
        source: the published original.
        summary: one line for tables.
        theirs: what of the block is the paper's, one sentence each; never empty.
        changes: what we changed and why, one sentence each; never empty.
        avoided: defects of published code that ours does not have.
        block: options of the block (:class:`medmamba.mixers.block.BlockOptions`), JSON values only.
    """

    name: str
    title: str
    source: Source
    summary: str
    theirs: tuple[str, ...]
    changes: tuple[str, ...]
    avoided: tuple[str, ...] = ()
    block: Mapping[str, Any] = field(default_factory=dict)
