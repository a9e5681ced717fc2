"""The encoder of a run as the file that plans are made like; see :mod:`medmamba.weights.encoder`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from torch import nn

from medmamba.networks import get_spec
from medmamba.weights.encoder import EncoderDescription, write_encoder
from medmamba_pretrain.corpus.store import Store
from medmamba_pretrain.objectives import get_objective
from medmamba_pretrain.recipe import Recipe

from .checkpoints import or_stop
from .normalisation import description_of

#: What a store's arrays run to along D, H, W, and nnU-Net's reader that gives the same.
AXES, READER = "SAR", "NibabelIOWithReorient"

_MAMBAMIM = (
    "Fenghe Tang et al., MambaMIM: Pre-training Mamba with State Space Token Interpolation, 2024, "
    "https://arxiv.org/abs/2408.08070"
)


def describe(recipe: Recipe, store: Store, step: int) -> EncoderDescription:
    """What the encoder of a run is, for whoever gets its file.

    Args:
        recipe: of the run.
        store: its corpus.
        step: optimizer steps that were made.
    """
    paper = get_spec(recipe.network).paper
    return EncoderDescription(
        network=recipe.network,
        arguments=recipe.network_arguments,
        input_channels=1,
        patch_size=recipe.patch_size,
        spacing_mm=store.settings.spacing_mm,
        axes=AXES,
        reader=READER,
        modality=recipe.modality,
        normalisation=description_of(recipe),
        corpus={"hash": store.digest, "volumes": len(store.accepted)},
        training={
            "objective": recipe.objective,
            "fill": recipe.fill or get_objective(recipe.objective).fill,
            "mask_ratio": recipe.mask_ratio,
            "steps": step,
            "planned_steps": recipe.steps,
            "crops_seen": step * recipe.batch_size,
            "seed": recipe.seed,
        },
        citation=(f"{paper.authors}, {paper.title}, {paper.year}, {paper.link}", _MAMBAMIM),
        version=version("medmamba"),
    )


def write_run_encoder(path: Path, encoder: nn.Module, recipe: Recipe, store: Store, step: int) -> None:
    """Write the encoder's file atomically.

    Raises:
        CommandError: the disk takes no more (exit code 75).
    """
    with or_stop(path):
        write_encoder(path, encoder, describe(recipe, store, step))
