"""MODEL_CARD.md of a package: what is known is written, what only its authors know is left for them to fill in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medmamba.command import printable

from .description import RESEARCH_USE, Description
from .labels import channel_names

_TO_FILL_IN = "_To be filled in by the authors._"
_OPEN = {
    "Data sources": "Which data it was trained on: names, versions, licences, consent, where the labels come from.",
    "Population": "Who is in these data: number of patients, age, sex, region, diseases, what was left out.",
    "Scanners and protocols": "Vendors, field strengths or tube voltages, sequences, contrast phases, years.",
    "Known failures": "Where it is known to be wrong, and on what it was never tried.",
}


def model_card(description: Description, network: str, parameters: int) -> str:
    """Text of the card.

    Args:
        description: of the model.
        network: what to call its network.
        parameters: of one fold.
    """
    return "\n".join(_lines(description, network, parameters)) + "\n"


def _lines(description: Description, network: str, parameters: int) -> Iterator[str]:
    settings, labels = description.settings, description.labels
    folds = ", ".join(description.folds)
    spacing = " x ".join(f"{mm:.3g}" for mm in settings["spacing"])
    yield f"# {printable(description.name)}"
    yield ""
    yield f"**{RESEARCH_USE}**"
    yield ""
    yield "## Model"
    yield ""
    yield f"- Network: {network}, {parameters:,} parameters, {description.precision}; folds: {folds}."
    yield f"- Trained with nnU-Net's configuration {printable(description.configuration)} by the trainer"
    yield f"  {printable(description.trainer)}."
    yield f"- Exported from {printable(description.checkpoint)}, {description.created}."
    yield f"- Input: {', '.join(map(printable, channel_names(description.dataset)))}, resampled to {spacing} mm;"
    yield f"  {_axes(description)}."
    yield f"- Output: {', '.join(f'{value} {printable(name)}' for value, name in labels.names.items())}."
    yield from rounding_lines(description)
    yield ""
    yield "## Intended use"
    yield ""
    yield description.intended_use
    for title, question in _OPEN.items():
        yield ""
        yield f"## {title}"
        yield ""
        yield f"{question}"
        yield ""
        yield _TO_FILL_IN
    yield ""
    yield "## Training images"
    yield ""
    yield from _images(description.fingerprint)
    yield ""
    yield "## Metrics"
    yield ""
    yield from _metrics(description)
    yield ""
    yield "## Licence of the weights"
    yield ""
    yield description.licence or "Not stated. Ask the authors before you use or share them."
    yield ""
    yield "The licence of the software that reads them is another matter."
    yield ""
    yield "## Citation"
    yield ""
    yield from (f"- {each}" for each in description.citation)


def rounding_lines(description: Description, metrics: str = "below") -> Iterator[str]:
    """What the export did to the numbers; ``metrics``: where they stand from here."""
    if description.precision != "float32":
        which = "The weights" if description.precision == "float16" else "The weights of convolutions and linear maps"
        yield f"- {which} were rounded to {description.precision} on export. The metrics {metrics} are of the unrounded"
        yield "  weights."
    if description.scan_input is not None:
        yield f"- What its scans read is clipped at the {description.scan_input['quantile']:g} quantile of"
        yield f"  {description.scan_input['cases']} cases; the metrics {metrics} were without."


def _axes(description: Description) -> str:
    if description.orientation == "SAR":
        return "images of any orientation are turned to superior, anterior, right"
    return "images are taken in the orientation in which they lie in their file, which must be that of the training"


def _images(fingerprint: dict[str, Any] | None) -> Iterator[str]:
    if fingerprint is None:
        yield "Not known: the trained folder held no fingerprint of its dataset."
        return
    yield f"{fingerprint['cases']} cases. Smallest, median and largest along the axes of the arrays:"
    yield ""
    yield "| | smallest | median | largest |"
    yield "|---|---|---|---|"
    middle = fingerprint["percentiles"].index(50)
    for key, title in (("spacing_mm", "spacing, mm"), ("shape_vox", "shape, voxels"), ("extent_mm", "extent, mm")):
        rows = (fingerprint[key][0], fingerprint[key][middle], fingerprint[key][-1])
        yield f"| {title} | {' | '.join(' x '.join(f'{value:.4g}' for value in row) for row in rows)} |"


def _metrics(description: Description) -> Iterator[str]:
    metrics = description.metrics
    if metrics is None:
        yield "None: the trained folder held no validation."
        return
    yield f"Source: {metrics['source']}."
    yield ""
    yield "| fold | cases | label | Dice |"
    yield "|---|---|---|---|"
    for fold, means in metrics["folds"].items():
        for label, scores in {**means["mean"], "mean of the foreground": means["foreground_mean"]}.items():
            dice = scores.get("Dice")
            yield f"| {fold} | {means['cases']} | {printable(label)} | {'-' if dice is None else f'{dice:.4f}'} |"
