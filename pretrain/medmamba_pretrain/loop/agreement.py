"""Whether recipe, corpus, processes and what a folder holds go together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmamba.command import CommandError
from medmamba_pretrain.corpus.store import Store
from medmamba_pretrain.recipe import Recipe

from .processes import Processes

_log = logging.getLogger(__name__)


def check_corpus(recipe: Recipe, store: Store) -> None:
    """Refuse a corpus of another modality or spacing than the recipe's, or an empty one.

    Raises:
        CommandError: with what to change.
    """
    settings = store.settings
    if settings.modality != recipe.modality:
        raise CommandError(
            f"{store.folder} holds {settings.modality}, the recipe is for {recipe.modality}; choose another recipe or "
            "corpus"
        )
    if recipe.spacing_mm and tuple(recipe.spacing_mm) != tuple(settings.spacing_mm):
        raise CommandError(
            f"{store.folder} has a spacing of {_mm(settings.spacing_mm)} mm, the recipe is for "
            f"{_mm(recipe.spacing_mm)} mm; ingest with --spacing {' '.join(f'{s:g}' for s in recipe.spacing_mm)}, or "
            f"--set spacing_mm=[{', '.join(f'{s:g}' for s in settings.spacing_mm)}]"
        )
    if not store.accepted:
        raise CommandError(f"{store.folder} holds no volume; `medmamba pretrain ingest` adds some")


def share_of_batch(recipe: Recipe, processes: Processes) -> int:
    """Crops of each process per step.

    Raises:
        CommandError: the processes cannot share the recipe's batch.
    """
    if recipe.batch_size % processes.count:
        raise CommandError(
            f"batch_size {recipe.batch_size} cannot be shared by {processes.count} processes; start a number that "
            "divides it, or --set batch_size=..."
        )
    return recipe.batch_size // processes.count


def check_same_run(state: Mapping[str, Any], recipe: Recipe, store: Store, out: Path) -> None:
    """Refuse to go on with another recipe than that of a checkpoint; warn if the corpus has changed.

    Raises:
        CommandError: with the entries that differ.
    """
    was, now = state["recipe"], recipe.to_dict()
    changed = [f"{name} {was.get(name)!r} -> {now[name]!r}" for name in now if was.get(name) != now[name]]
    if changed:
        raise CommandError(
            f"{out} holds a run of another recipe ({'; '.join(changed)}); use the same recipe, or another --out"
        )
    if state["corpus"] != store.digest:
        _log.warning(
            "%s is not the corpus that %s began with; crops from step %d on come from the new one",
            store.folder,
            out,
            state["step"],
        )


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in spacing)
