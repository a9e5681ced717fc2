"""A smaller copy of a package: its weights rounded, and what its scans read limited."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .architecture import Blueprint
from .card import rounding_lines
from .description import Description
from .export import generated_card, now, write_package
from .load import Model
from .package import weights_file
from .problems import ModelRefused
from .rounding import PRECISIONS_OF_FORMAT_1


def convert_model(
    model: Model, out: str | os.PathLike[str], *, precision: str, scan_input: Mapping[str, Any] | None = None
) -> Model:
    """Write a package with the weights of another one.

    The card is made anew, if it is the generated one; what authors have written stays, with a section on the rounding.

    Args:
        model: with weights in float32 or float16.
        out: folder of the package; it must not exist.
        precision: of the stored weights; see :mod:`.rounding`.
        scan_input: see :func:`.scan_input.check_scan_input`.

    Returns:
        the package, loaded.

    Raises:
        ModelRefused: MM-MD-038 for a package that was made in this way; MM-MD-009, MM-MD-036, MM-MD-037.
        OSError: as :func:`.export.export_model`.
    """
    before = model.description
    if before.precision not in PRECISIONS_OF_FORMAT_1 or before.scan_input is not None:
        raise ModelRefused(
            "MM-MD-038",
            f"{model.path} is such a copy already, in {before.precision}; take the package or the training that it was "
            "made of",
        )
    limits = None if scan_input is None else dict(scan_input)
    after = replace(before, precision=precision, scan_input=limits, created=now())
    weights = {fold: partial(_weights, model, fold) for fold in model.folds}
    return write_package(Path(out).absolute(), after, weights, _card(model, before, after))


def _weights(model: Model, fold: str) -> tuple[Path, Mapping[str, Tensor]]:
    return model.path / weights_file(fold), model.network(fold).state_dict()


def _card(model: Model, before: Description, after: Description) -> Callable[[Blueprint], str]:
    def text(blueprint: Blueprint) -> str:
        if model.card == generated_card(before, blueprint):
            return generated_card(after, blueprint)
        lines = ["", "## Smaller copy", "", f"- Made from the package {model.id}.", *rounding_lines(after, "above")]
        return "\n".join([model.card.rstrip("\n"), *lines]) + "\n"

    return text
