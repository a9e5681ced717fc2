"""How large the input of a model's scans is, on images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medmamba.command import CommandError
from medmamba.mixers import counted_scan_inputs

from .check import Case, find_cases
from .model import Model
from .predictor import ModelPredictor
from .reading import Image, ImageRefused, read_image
from .settle import settle


def scan_input_limits(
    model: Model, images: Path, quantile: float, *, device: str = "cpu", say: Callable[[str], object] = print
) -> dict[str, Any]:
    """What ``scan_input`` of a model.json holds: for every scan of every fold, a quantile of the size of what it reads.

    The images are predicted without mirroring; all values that a scan reads in all tiles of all cases count alike.

    Args:
        model: without limits.
        images: file or folder, as for a prediction.
        quantile: above 0, at most 1; Quamba takes 0.9995 to 0.99999.
        device: to compute on.
        say: takes one line of progress.

    Raises:
        CommandError: a model without scans, no image, or one that cannot be read.
    """
    cases = find_cases(images, len(model.channel_names)).cases if images.exists() else ()
    if not cases:
        raise CommandError(f"{images} holds no image; give a file or a folder of images like those of the training")
    limits: dict[str, dict[str, float]] = {}
    for fold in model.folds:
        predictor = ModelPredictor(model, (fold,), device, mirrors=False)
        (network,) = predictor.networks
        with counted_scan_inputs(network) as counts:
            if not counts:
                raise CommandError(f"{model.path} has no scan whose input could be clipped; leave the quantile out")
            for case in cases:
                predictor.predict(_channels(model, case), should_stop=lambda: False)
                say(f"fold {fold}: {case.id} counted")
        limits[fold] = {name: each.quantile(quantile) for name, each in counts.items()}
    return {"quantile": quantile, "cases": len(cases), "limits": limits}


def _channels(model: Model, case: Case) -> list[Image]:
    if case.problem is not None:
        raise CommandError(f"{case.id} cannot be used: {case.problem.text}")
    try:
        return settle(model, [read_image(path) for path in case.files])
    except ImageRefused as error:
        raise CommandError(f"{case.id} cannot be used: {error}") from error
