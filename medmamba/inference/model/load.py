"""A model package, checked as a whole before anything is built from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.mixers import clip_scan_inputs

from .architecture import Blueprint, blueprint_of, build, network_name
from .description import Description
from .labels import Labels, channel_names
from .package import CARD, MODEL, Package, open_package, weights_file
from .problems import ModelRefused, shown
from .rounding import decoded, layout
from .scan_input import check_names
from .tensors import check_file, check_fit, check_values, count_tensors, facts, from_bytes, parameters


@dataclass(frozen=True, eq=False)
class Model:
    """A model package that was checked. Values are copies: changing them does not change the model.

    Attributes:
        card: text of MODEL_CARD.md.
        parameters: of one fold.
    """

    card: str
    parameters: int
    _description: Description = field(repr=False)
    _package: Package = field(repr=False)
    _blueprint: Blueprint = field(repr=False)

    @property
    def id(self) -> str:
        """SHA-256 of SHA256SUMS: it names every byte of the package."""
        return self._package.id

    @property
    def path(self) -> Path:
        """Folder of the package."""
        return self._package.folder

    @property
    def description(self) -> Description:
        """All of model.json."""
        return deepcopy(self._description)

    @property
    def name(self) -> str:
        return self._description.name

    @property
    def plans(self) -> dict[str, Any]:
        """Plans of nnU-Net with one configuration, for its ``PlansManager``."""
        return deepcopy(self._description.plans)

    @property
    def configuration_name(self) -> str:
        return self._description.configuration

    @property
    def configuration(self) -> dict[str, Any]:
        """The configuration of the plans, with what it inherited."""
        return deepcopy(self._description.settings)

    @property
    def dataset_json(self) -> dict[str, Any]:
        return deepcopy(self._description.dataset)

    @property
    def labels(self) -> Mapping[int, str]:
        """Value in a segmentation -> name, background included; see :class:`Labels` for regions."""
        return self._description.labels.names

    @property
    def channel_names(self) -> list[str]:
        """Names of the image channels, in the order of the network's input."""
        return channel_names(self._description.dataset)

    @property
    def outputs(self) -> Labels:
        """What the outputs of the network mean."""
        return self._description.labels

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        return deepcopy(self._description.fingerprint)

    @property
    def orientation(self) -> str:
        """ "SAR": images are turned to superior, anterior, right first; "file": they are taken as they lie."""
        return self._description.orientation

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Spatial axes of the network's input along which a prediction may be mirrored."""
        return tuple(self._description.inference_allowed_mirroring_axes or ())

    @property
    def folds(self) -> tuple[str, ...]:
        """Folds of the package: "0", "1", ... or "all"."""
        return self._description.folds

    @property
    def network_name(self) -> str:
        return network_name(self._description.settings["architecture"])

    def network(self, fold: str | int) -> nn.Module:
        """The network of a fold: on the CPU, float32, in eval mode, without deep supervision.

        Args:
            fold: of ``folds``; a number stands for its text.

        Raises:
            ModelRefused: MM-MD-018: no such fold; MM-MD-003, MM-MD-006 and others: the file is no longer the one that
                was checked.
        """
        fold = str(fold)
        if fold not in self.folds:
            raise ModelRefused(
                "MM-MD-018", f"{self.path} has no fold {shown(fold)}; it has {', '.join(self.folds)}: take one of these"
            )
        tensors = self._weights(fold)
        about = self._description
        # Drawing initial values, which are replaced at once, must not change what the caller draws next.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            network = build(about.settings["architecture"], about.input_channels, about.labels.num_heads)
        network.load_state_dict({key: tensors[name] for key, name in self._blueprint.aliases.items()}, strict=True)
        if about.scan_input is not None:
            clip_scan_inputs(network, about.scan_input["limits"][fold])
        return network

    def _weights(self, fold: str) -> dict[str, Tensor]:
        """Weights of a fold from the bytes whose checksum was compared."""
        name = weights_file(fold)
        tensors = from_bytes(self._package.read(name), self.path / name)
        check_fit(self.path / name, facts(tensors), layout(self._blueprint, self._description.precision))
        for key, tensor in tensors.items():
            check_values(self.path / name, key, tensor)
        return decoded(tensors, self._blueprint)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Open a model package and check all of it: names, checksums, values, network, weights.

    Args:
        path: folder that ``medmamba export`` wrote.

    Raises:
        ModelRefused: with an id of ``PROBLEMS``; nothing in the package was run, and nothing larger than the package
            was allocated.
    """
    return load_opened(open_package(path))


def load_opened(package: Package) -> Model:
    """As :func:`load_model`, with a package whose names were checked.

    Raises:
        ModelRefused: as there.
    """
    content = package.read(MODEL)
    description = Description.from_bytes(content)
    _check_files(package, description)
    card = _text(package, CARD)
    binding = hashlib.sha256(content).hexdigest()
    block, labels = description.settings["architecture"], description.labels
    files = {fold: package.folder / weights_file(fold) for fold in description.folds}
    for file in files.values():
        package.check(file.name)
    num_tensors = count_tensors(files[description.folds[0]])
    blueprint = blueprint_of(block, description.input_channels, labels.num_heads, num_tensors)
    check_names(description.scan_input, blueprint.scans)
    for fold, file in files.items():
        check_file(file, layout(blueprint, description.precision), binding, fold)
    return Model(card, parameters(blueprint.tensors.values()), description, package, blueprint)


def _check_files(package: Package, description: Description) -> None:
    listed = {weights_file(fold) for fold in description.folds}
    present = set(package.sums) - {MODEL, CARD}
    if listed - present:
        raise ModelRefused(
            "MM-MD-003", f"{package.folder} has no {', '.join(sorted(listed - present))}; get the package again"
        )
    if present - listed:
        raise ModelRefused(
            "MM-MD-004",
            f"{package.folder} holds {', '.join(sorted(present - listed))}, which model.json does not name; get the "
            "package again",
        )


def _text(package: Package, name: str) -> str:
    try:
        return package.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelRefused("MM-MD-007", f"{package.folder / name} is no UTF-8 text; get the package again") from error
