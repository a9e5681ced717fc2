"""Pretrained encoders: one file, and into the encoder of a network.

The file is a ``.safetensors``: the state dict of ``network.encoder`` (names without ``encoder.``, float32), with the
description as JSON in the header, so that neither can lose the other, and a checksum over both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from medmamba.files import write_atomically
from medmamba.networks import create_network

from .description import EncoderDescription
from .errors import WeightsError
from .files import first_line
from .inflate import Step, channels_of_image
from .report import Report

#: Key in the header of the file.
METADATA = "medmamba_encoder"
CHECKSUM = "medmamba_sha256"
FORMAT_VERSION = 1

__all__ = ["EncoderDescription", "load_encoder", "read_encoder", "stem_key", "write_encoder"]


def write_encoder(path: str | os.PathLike[str], encoder: nn.Module, description: EncoderDescription) -> None:
    """Write an encoder and its description; an existing file stays until the new one is complete.

    Args:
        path: of the ``.safetensors`` file.
        encoder: ``network.encoder`` of the network that the description names, on any device.
        description: of it.

    Raises:
        WeightsError: the encoder is not the described one, or holds values that are not finite; nothing is written.
        OSError: the folder is missing, full or not writable.
    """
    from safetensors.torch import save

    # Copies: tensors that share memory cannot be written.
    tensors = {name: _on_cpu(value) for name, value in encoder.state_dict().items()}
    _check(described_encoder(description), tensors)
    text = json.dumps({"format": FORMAT_VERSION, **description.to_json()})
    metadata = {METADATA: text, CHECKSUM: _checksum(text, tensors)}
    content = save(tensors, metadata)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def read_encoder(path: str | os.PathLike[str]) -> tuple[EncoderDescription, dict[str, Tensor]]:
    """Description and tensors of an encoder file, on the CPU.

    Raises:
        WeightsError: the file is missing, damaged, of a newer format, or no encoder of medmamba.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is no file; give an encoder.safetensors of `medmamba pretrain run`")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata()
            description = _description(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path} cannot be read as safetensors ({first_line(error)}); it is cut short or of another kind: copy it "
            "again, or give an encoder.safetensors of `medmamba pretrain run`"
        ) from error
    if not tensors:
        raise WeightsError(f"{path} holds no tensors; write the encoder again")
    if metadata.get(CHECKSUM) != _checksum(metadata[METADATA], tensors):
        raise WeightsError(f"{path} is damaged: its checksum does not fit what it holds; copy it again")
    return description, tensors


def load_encoder(network: nn.Module, tensors: Mapping[str, Tensor], description: EncoderDescription) -> Report:
    """Load an encoder into ``network.encoder``: every tensor, or an error and the network as it was.

    The tensors go into the module ``network.encoder``, so names under which a network lists them a second time have
    the new values too. Another number C of image channels repeats the weights of the first convolution and divides them
    by C: for an image whose channels are equal the response is the same.

    Args:
        network: with the encoder of the description; of any classes and image channels.
        tensors: of :func:`read_encoder`.
        description: of it.

    Returns:
        what became of every tensor of either side; ``missing`` is what is not of the encoder.

    Raises:
        WeightsError: no encoder in the network, names or shapes that differ, values that are not finite, no tensors.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise WeightsError(f"a {type(network).__name__} has no encoder to load into; give a network of create_network")
    values, adapted, stem = dict(tensors), {}, stem_key(encoder)
    if stem is not None and stem in values:
        for step in _image_channels(values[stem], encoder.get_parameter(stem)):
            values[stem] = step.apply(values[stem])
            adapted[f"encoder.{stem}"] = (stem, step.how)
    _check(encoder, values)
    encoder.load_state_dict(values, strict=True)
    loaded = {f"encoder.{name}": name for name in values}
    return Report(
        source=f"encoder of {description.network}, {description.training.get('steps', '?')} steps on "
        f"{description.corpus['volumes']} volumes",
        network=description.network,
        loaded={key: name for key, name in loaded.items() if key not in adapted},
        adapted=adapted,
        missing={key: "a decoder, and the file is an encoder" for key in network.state_dict() if key not in loaded},
        unused={},
    )


def stem_key(encoder: nn.Module) -> str | None:
    """Name of the weight that sees the image first, or None if that is no convolution.

    Found by a forward pass that stops there: an encoder may list its modules in any order.
    """
    named = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    if not named:
        return None
    names: dict[nn.Module, str] = {module: name for name, module in named}
    first = named[0][1]

    def stop(module: nn.Module, inputs: object) -> None:
        raise _Reached(module)

    hooks = [module.register_forward_pre_hook(stop) for module in names]
    image = torch.empty(1, first.in_channels, *[1] * (first.weight.dim() - 2), device=first.weight.device)
    try:
        with torch.no_grad():
            encoder(image)
    except _Reached as reached:
        return f"{names[reached.module]}.weight"
    finally:
        for hook in hooks:
            hook.remove()
    return None


def described_encoder(description: EncoderDescription) -> nn.Module:
    """The encoder that a description names, without memory: on torch's meta device.

    Raises:
        WeightsError: the network refuses the arguments.
    """
    try:
        with torch.device("meta"):
            network = create_network(description.network, description.input_channels, 2, **description.arguments)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"the description of the encoder names arguments that {description.network} refuses ({first_line(error)}); "
            "install the version of medmamba that wrote it"
        ) from error
    encoder: nn.Module = network.encoder  # type: ignore[assignment]
    return encoder


class _Reached(Exception):
    """Ends a forward pass at a module."""

    def __init__(self, module: nn.Module):
        self.module = module


def _checksum(description: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the description and of the bytes of all tensors, by name."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _on_cpu(value: Tensor) -> Tensor:
    value = value.detach()
    return value.to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True).contiguous()


def _image_channels(value: Tensor, target: Tensor) -> list[Step]:
    """What leads to another number of image channels; nothing where more than that differs."""
    if value.dim() != target.dim() or value[:, :1].shape != target[:, :1].shape:
        return []
    return channels_of_image(target.shape[1], value.shape[1])


def _check(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those of the encoder."""
    if not tensors:
        raise WeightsError("there are no tensors to load; give the state dict of an encoder")
    expected = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} has no place in the network" for name in given if name not in expected]
    wrong += [
        f"{name} has the shape {shape}, the network has {expected[name]}"
        for name, shape in given.items()
        if shape != expected.get(name, shape)
    ]
    if wrong:
        more = f", and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise WeightsError(
            f"these tensors are not those of this encoder: {'; '.join(wrong[:2])}{more}; build the network with the "
            "arguments in the description of the encoder"
        )
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise WeightsError(f"{name} holds values that are not finite; the training failed or the file is damaged")


def _description(path: Path, metadata: Mapping[str, str] | None) -> EncoderDescription:
    if not metadata or METADATA not in metadata:
        raise WeightsError(
            f"{path} has no description of an encoder ({METADATA} in its header), so spacing, axes and normalisation "
            "are unknown; give an encoder.safetensors of `medmamba pretrain run`"
        )
    try:
        content = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a description that is not JSON ({error}); write the encoder again") from error
    number = content.pop("format", None) if isinstance(content, dict) else None
    if isinstance(number, int) and number > FORMAT_VERSION:
        raise WeightsError(
            f"{path} has format {number}, this version of medmamba reads up to {FORMAT_VERSION}; update medmamba"
        )
    if number != FORMAT_VERSION:
        raise WeightsError(f"{path} has the format {number!r}, expected {FORMAT_VERSION}; write the encoder again")
    try:
        return EncoderDescription.from_json(content)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
