"""The description of a pretrained encoder as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from medmamba.weights import EncoderDescription


def describe_encoder(description: EncoderDescription, tensors: Mapping[str, Tensor]) -> str:
    """Some ten lines: network, images, training, corpus, what to cite.

    Args:
        description: of an encoder file.
        tensors: of the same file.
    """
    parameters = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        ("network", f"{description.network}, {len(tensors)} tensors, {parameters:,} values"),
        ("arguments", _pairs(description.arguments)),
        (
            "images",
            f"{description.modality.upper()}, {description.input_channels} channels, {_normalisation(description)}",
        ),
        ("patch", f"{_times(description.patch_size)} voxels of {_times(description.spacing_mm)} mm"),
        ("axes", f"{description.axes}, as {description.reader} gives them"),
        ("corpus", _pairs(description.corpus)),
        ("training", _pairs(description.training)),
        ("medmamba", description.version),
        *(("cite", text) for text in description.citation),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _normalisation(description: EncoderDescription) -> str:
    constants = {name: value for name, value in description.normalisation.items() if name != "scheme"}
    scheme = description.normalisation["scheme"]
    return f"{scheme} ({_pairs(constants)})" if constants else f"{scheme} per volume"


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
