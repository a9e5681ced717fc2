"""What ``medmamba info`` says about a model package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medmamba.command import CommandError, printable
from medmamba.inference.model import Model, ModelRefused, load_model


def describe(path: Path) -> Iterator[str]:
    """Lines about a model package, all of which is checked first.

    Raises:
        CommandError: it is refused; the text has the id of the reason.
    """
    try:
        model = load_model(path)
    except ModelRefused as error:
        raise CommandError(str(error)) from error
    return _lines(model)


def _lines(model: Model) -> Iterator[str]:
    about, settings = model.description, model.configuration
    yield f"model package {printable(model.name)}: all checksums fit, no code in it"
    yield f"id: {model.id}"
    yield (
        f"network: {model.network_name}, {model.parameters / 1e6:.3f} M parameters, stored as {about.precision}, "
        f"{model.outputs.num_heads} outputs"
    )
    if about.scan_input is not None:
        clipped = about.scan_input
        yield f"input of the scans: clipped at the {clipped['quantile']:g} quantile of {clipped['cases']} cases"
    epochs = ", ".join(f"{fold} ({number} epochs)" for fold, number in about.epochs.items())
    yield f"folds: {epochs}, {printable(about.checkpoint)} of {printable(about.trainer)}, exported {about.created}"
    yield f"input: {', '.join(_channels(model, settings))}"
    yield (
        f"spacing: {_times(settings['spacing'])} mm, patch {_times(settings['patch_size'])}, "
        f"configuration {printable(model.configuration_name)}"
    )
    yield f"orientation: {_ORIENTATIONS[model.orientation]}"
    yield f"labels: {', '.join(f'{value} {printable(name)}' for value, name in model.labels.items())}"
    yield f"training images: {_images(model.fingerprint)}"
    yield from _metrics(about.metrics)
    yield f"licence of the weights: {printable(about.licence or 'not stated')}"
    yield f"intended use: {printable(about.intended_use)}"
    made_with = ", ".join(f"{software} {version}" for software, version in about.versions.items())
    yield f"made with: {printable(made_with)}"


_ORIENTATIONS: Mapping[str, str] = {
    "SAR": "any; images are turned to superior, anterior, right",
    "file": "that of the training files; images are taken as they lie",
}


def _channels(model: Model, settings: Mapping[str, Any]) -> Iterator[str]:
    for name, scheme in zip(model.channel_names, settings["normalization_schemes"], strict=True):
        yield f"{printable(name)} ({scheme})"


def _images(fingerprint: Mapping[str, Any] | None) -> str:
    if fingerprint is None:
        return "not known"
    spacing, shape = fingerprint["spacing_mm"], fingerprint["shape_vox"]
    return (
        f"{fingerprint['cases']} cases, spacing {_times(spacing[0])} to {_times(spacing[-1])} mm, "
        f"shape {_times(shape[0])} to {_times(shape[-1])}"
    )


def _metrics(metrics: Mapping[str, Any] | None) -> Iterator[str]:
    if metrics is None:
        yield "metrics: none"
        return
    for fold, means in metrics["folds"].items():
        dice = means["foreground_mean"].get("Dice")
        yield f"metrics: fold {fold}, {means['cases']} cases, Dice {'-' if dice is None else f'{dice:.4f}'}"
    yield f"metrics from: {printable(metrics['source'])}"


def _times(values: list[float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)
