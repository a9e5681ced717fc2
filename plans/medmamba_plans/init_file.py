"""A pretrained encoder in the whole network of a plan, as the file that nnU-Net's ``-pretrained_weights`` takes.

nnU-Net wants every key of the network but those of the heads, so the decoder goes into the file with its initial
values.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import CommandError
from medmamba.files import write_atomically
from medmamba.nnunet.architecture import initial_network, network_ends
from medmamba.nnunet.folders import configuration_of
from medmamba.weights import Report, load_encoder
from medmamba_plans.derive import PlanError
from medmamba_plans.like import Encoder

if TYPE_CHECKING:
    from torch import nn


def write_init_file(
    path: Path,
    encoder: Encoder,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    seed: int = 0,
) -> Report:
    """Write ``{"network_weights", "medmamba"}``: encoder from its file, decoder from its initialiser; on the CPU.

    Before the file gets its name, nnU-Net's own function has loaded it into a fresh network, and every tensor of the
    encoder has been compared.

    Args:
        path: of the file; replaced if it was made for the same encoder.
        encoder: that fits the plans, see :func:`medmamba_plans.like_check.check_like`.
        plans: of a dataset.
        configuration: its name.
        dataset_json: of the dataset.
        seed: of what the encoder does not hold.

    Returns:
        what became of every tensor.

    Raises:
        WeightsError: the encoder does not fit the network, or nothing of it.
        PlanError: after nnU-Net's loading the encoder is another one.
        CommandError: the file cannot be written, or holds something else.
    """
    import torch

    check_init_replaceable(path, encoder)
    planned = configuration_of(plans, configuration)
    channels, classes = network_ends(plans, planned, dataset_json)

    def fresh(number: int) -> nn.Module:
        return initial_network(planned["architecture"], channels, classes, number)

    network = fresh(seed)
    report = load_encoder(network, encoder.tensors, encoder.description)
    facts = {
        "encoder": encoder.as_json(),
        "plans": plans["plans_name"],
        "configuration": configuration,
        "seed": seed,
        "version": version("medmamba"),
    }
    content = {"network_weights": network.state_dict(), "medmamba": facts}

    def write(temporary: str) -> None:
        torch.save(content, temporary)
        _verify(temporary, network, fresh(seed + 1))

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its archive.
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CommandError(
            f"{path} cannot be written ({reason}); make room, or name another file with --init"
        ) from error
    return report


def check_init_replaceable(path: Path, encoder: Encoder) -> None:
    """Refuse to replace a file that was not made from this encoder.

    Raises:
        CommandError: the file holds something else.
    """
    import torch

    if not path.exists():
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        owner = content["medmamba"]["encoder"]["sha256"]
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        owner = None
    if owner != encoder.sha256:
        holds = f"the encoder {owner[:8]}" if isinstance(owner, str) else "something else"
        raise CommandError(f"{path} holds {holds}, not {encoder.path.name}; name another file with --init")


def _verify(path: str, network: nn.Module, fresh: nn.Module) -> None:
    import torch
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            load_pretrained_weights(fresh, path)
    except (AssertionError, RuntimeError) as error:
        raise PlanError(f"nnU-Net does not load what was written: {error}") from error
    expected, found = network.state_dict(), fresh.state_dict()
    wrong = [key for key in expected if ".seg_layers." not in key and not torch.equal(expected[key], found[key])]
    if wrong:
        raise PlanError(f"nnU-Net loads another {wrong[0]} from {path} than was written, and {len(wrong) - 1} more")
