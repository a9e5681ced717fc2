"""From a trained folder of nnU-Net to a model package, which appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medmamba.files import write_atomically
from medmamba.networks import NETWORKS

from .architecture import Blueprint, blueprint_of, network_name
from .card import model_card
from .description import DATASET_KEPT, RESEARCH_USE, Description
from .fingerprint import reduce_fingerprint
from .load import Model, load_model, load_opened
from .metrics import reduce_metrics
from .package import CARD, MODEL, SUMS, Package, open_package, sums_of, weights_file
from .plans import orientation_of, reduce_plans
from .problems import ModelRefused, shown
from .rounding import encoded
from .run import TRAINERS_THAT_FOLLOW_PLANS, Fold, Run, find_run, read_fold
from .tensors import check_finite, check_fit, parameters, to_bytes

_NNUNET = (
    "Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, Nature "
    "Methods 18, 203-211 (2021)"
)
#: Where weights come from, and the state dict of their network.
Weights = Callable[[], tuple[Path, Mapping[str, Tensor]]]
_SOFTWARE = ("medmamba", "nnunetv2", "torch", "numpy", "safetensors", "dynamic-network-architectures")


def export_model(
    run_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    folds: Sequence[str | int] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    licence: str | None = None,
    intended_use: str | None = None,
    precision: str = "float32",
    trust_plans: bool = False,
) -> Model:
    """Write a model package from a trained folder of nnU-Net, of ours or a stock network.

    The package is written beside ``out``, read back and checked, and moved to ``out`` when it is on disk.

    Args:
        run_folder: ``nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION``.
        out: folder of the package; it must not exist.
        folds: to be exported; None: all that have the checkpoint.
        checkpoint: file in every fold.
        licence: of the weights.
        intended_use: in the words of the authors; that it is for research is added.
        precision: of the stored weights; see :mod:`.rounding`.
        trust_plans: export the network of the plans also when an unknown trainer may have built another one.

    Returns:
        the package, loaded.

    Raises:
        ModelRefused: with an id of ``PROBLEMS``; nothing was written.
        OSError: the disk is full or the folder is not writable; nothing was written.
    """
    out = Path(out).absolute()
    _check_place(out)  # before minutes of reading
    run = find_run(run_folder, folds, checkpoint)
    first = _facts(run, run.folds[0])
    plans = reduce_plans(run.plans, first.configuration)
    facts = {fold: _facts(run, fold) for fold in run.folds}
    for fold, each in facts.items():
        _check_trainer(run, fold, each, trust_plans)
        _check_alike(run, fold, each, first, plans)
    description = Description(
        name=f"{plans.get('dataset_name')} {first.trainer} {plans.get('plans_name')} {first.configuration}",
        created=now(),
        configuration=first.configuration,
        plans=plans,
        dataset={key: run.dataset_json[key] for key in DATASET_KEPT if key in run.dataset_json},
        fingerprint=reduce_fingerprint(run.fingerprint),
        orientation=orientation_of(plans),
        inference_allowed_mirroring_axes=None if first.mirror_axes is None else list(first.mirror_axes),
        trainer=first.trainer,
        checkpoint=checkpoint,
        epochs={fold: each.epochs for fold, each in facts.items()},
        precision=precision,
        versions=_versions(first),
        licence=licence,
        intended_use=RESEARCH_USE if not intended_use else f"{intended_use} {RESEARCH_USE}",
        metrics=reduce_metrics(run.summaries()),
        citation=_citation(plans, first.configuration, run.dataset_json),
    )
    weights = {fold: partial(_weights_of_run, run, fold) for fold in run.folds}
    return write_package(out, description, weights)


def write_package(
    out: Path, description: Description, weights: Mapping[str, Weights], card: Callable[[Blueprint], str] | None = None
) -> Model:
    """Write a package beside ``out``, read it back, check it, and move it to ``out``.

    Args:
        out: absolute path.
        description: what it is to say.
        weights: fold -> where the weights come from, and the state dict of the network; asked for one by one.
        card: text of its card; None: what the description says.

    Raises:
        ModelRefused, OSError: as :func:`export_model`.
    """
    _check_place(out)
    with _appearing(out) as folder:
        _write(folder, description, weights, card)
        written = load_model(folder)
    return replace(written, _package=replace(written._package, folder=out))


def _weights_of_run(run: Run, fold: str) -> tuple[Path, Mapping[str, Tensor]]:
    return run.path(fold), read_fold(run, fold).weights


def seal_card(path: str | os.PathLike[str]) -> Model:
    """Accept the MODEL_CARD.md of a package as its authors have changed it: write its checksum into SHA256SUMS.

    The id of the model changes with it. Everything else must be as it was exported.

    Raises:
        ModelRefused: as :func:`load_model`, for anything but the card; SHA256SUMS stays as it was.
        OSError: the folder is full or not writable.
    """
    package = open_package(path)
    with (package.folder / CARD).open("rb") as stream:
        sums = {**package.sums, CARD: hashlib.file_digest(stream, "sha256").hexdigest()}
    content = sums_of(sums)
    sealed = load_opened(Package(package.folder, sums, hashlib.sha256(content).hexdigest()))
    write_atomically(package.folder / SUMS, lambda temporary: Path(temporary).write_bytes(content))
    return sealed


def _facts(run: Run, fold: str) -> Fold:
    """What a checkpoint says beside its weights. They are read again when they are written: one fold at a time."""
    return replace(read_fold(run, fold), weights={})


def _check_trainer(run: Run, fold: str, facts: Fold, trust_plans: bool) -> None:
    if facts.trainer_of_network not in TRAINERS_THAT_FOLLOW_PLANS and not trust_plans:
        raise ModelRefused(
            "MM-MD-035",
            f"{run.path(fold)} was trained by {shown(facts.trainer_of_network)}, which may build another network than "
            "the plans name, with weights of the same names and shapes; add --trust-plans if you know that it does not",
        )


def _check_alike(run: Run, fold: str, facts: Fold, first: Fold, plans: dict[str, Any]) -> None:
    """Raise unless this fold was trained as the first one, and as the files of the folder say."""
    path = run.path(fold)
    compared: dict[str, tuple[object, object]] = {
        "configuration": (facts.configuration, first.configuration),
        "mirror axes": (facts.mirror_axes, first.mirror_axes),
        "trainer": (facts.trainer, first.trainer),
    }
    if facts.configuration == first.configuration and facts.plans:
        trained = _relevant(reduce_plans(facts.plans, facts.configuration), facts.configuration)
        compared["plans"] = (trained, _relevant(plans, facts.configuration))
    if facts.dataset_json:
        compared["labels and channels"] = (_meaning(facts.dataset_json), _meaning(run.dataset_json))
    different = [what for what, (found, expected) in compared.items() if found != expected]
    if different:
        raise ModelRefused(
            "MM-MD-034",
            f"{path} was trained with other {' and '.join(different)} than fold {run.folds[0]} or the JSON files of "
            f"{run.folder}; restore these files, or export the folds apart (--fold)",
        )


def _relevant(plans: dict[str, Any], configuration_name: str) -> dict[str, Any]:
    """What of reduced plans a prediction depends on."""
    unused = ("batch_size", "data_identifier", "median_image_size_in_voxels", "batch_dice")
    names = ("image_reader_writer", "transpose_forward", "transpose_backward", "label_manager")
    intensities = "foreground_intensity_properties_per_channel"
    settings = plans["configurations"][configuration_name]
    relevant = {name: plans.get(name) for name in (*names, intensities)}
    return relevant | {key: value for key, value in settings.items() if key not in unused}


def _meaning(dataset_json: Mapping[str, Any]) -> list[Any]:
    """Labels and channels of a dataset.json; the order of the labels is part of it."""
    keys = ("labels", "regions_class_order", "channel_names", "modality")
    return json.loads(json.dumps([_ordered(dataset_json.get(key)) for key in keys]))


def _ordered(value: object) -> object:
    return list(value.items()) if isinstance(value, Mapping) else value


def _check_place(out: Path) -> None:
    if os.path.lexists(out):
        raise ModelRefused("MM-MD-037", f"{out} exists already; choose another place, or move it away")
    if not out.parent.is_dir():
        raise ModelRefused("MM-MD-037", f"{out.parent} is no folder; create it")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its name when all of it is on disk, and otherwise goes away."""
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    folder.mkdir()
    try:
        yield folder
        _to_disk(folder)
        try:
            folder.rename(out)
        except OSError as error:
            if not out.exists():
                raise
            raise ModelRefused("MM-MD-037", f"{out} appeared during the export; choose another place") from error
        _to_disk(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(
    folder: Path,
    description: Description,
    weights: Mapping[str, Weights],
    card: Callable[[Blueprint], str] | None,
) -> None:
    """All files of a package, SHA256SUMS last. Checksums are of what was to be written, so that a reader notices."""
    content = description.to_bytes()
    sums = {MODEL: _put(folder / MODEL, content)}
    blueprint: Blueprint | None = None
    for fold, read in weights.items():
        path, found = read()
        block, heads = description.settings["architecture"], description.labels.num_heads
        blueprint = blueprint or blueprint_of(block, description.input_channels, heads, len(found))
        tensors = _own_tensors(path, found, blueprint, description.precision)
        name = weights_file(fold)
        sums[name] = _put(folder / name, to_bytes(tensors, sums[MODEL], fold))
    assert blueprint is not None  # a description has a fold
    text = card(blueprint) if card else generated_card(description, blueprint)
    sums[CARD] = _put(folder / CARD, text.encode("utf-8"))
    _put(folder / SUMS, sums_of(sums))


def generated_card(description: Description, blueprint: Blueprint) -> str:
    """The card of a package whose authors have not yet said anything."""
    network = network_name(description.settings["architecture"])
    return model_card(description, network, parameters(blueprint.tensors.values()))


def _own_tensors(path: Path, weights: Mapping[str, Tensor], blueprint: Blueprint, precision: str) -> dict[str, Tensor]:
    """Weights that fit a network, each under one name and as they are stored.

    A state dict may have a tensor under several names: nnU-Net's decoder lists the encoder again.

    Raises:
        ModelRefused: MM-MD-015, MM-MD-017, MM-MD-036.
    """
    expected, aliases = blueprint.tensors, blueprint.aliases
    wanted = {key: (tuple(expected[name].shape), _kind(expected[name])) for key, name in aliases.items()}
    check_fit(path, {key: (tuple(tensor.shape), _kind(tensor)) for key, tensor in weights.items()}, wanted)
    for key, name in aliases.items():
        check_finite(path, key, weights[key])
        if not torch.equal(weights[key], weights[name]):
            raise ModelRefused(
                "MM-MD-015",
                f"{shown(name)} and {shown(key)} in {path} are one tensor of the network and differ; the file was "
                "changed after the training",
            )
    stored: dict[str, Tensor] = {}
    for name in expected:
        stored |= encoded(name, weights[name], blueprint, precision, path)
    return stored


def _kind(tensor: Tensor) -> object:
    """Types that are stored alike: all that float32 holds exactly."""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    return "a float of at most 32 bits" if tensor.dtype in floats else tensor.dtype


def _put(path: Path, content: bytes) -> str:
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(content).hexdigest()


def _to_disk(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def now() -> str:
    """Time of an export: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions(facts: Fold) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _SOFTWARE:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions if facts.medmamba is None else {**versions, "medmamba in training": facts.medmamba}


def _citation(plans: dict[str, Any], configuration_name: str, dataset_json: Mapping[str, Any]) -> list[str]:
    """Papers of the network and of nnU-Net, and what the dataset asks for."""
    path = plans["configurations"][configuration_name].get("architecture", {}).get("network_class_name")
    papers = [spec.paper for spec in NETWORKS.values() if spec.build == path]
    cited = [f"{paper.authors}, {paper.title}, {paper.venue} {paper.year}, {paper.link}" for paper in papers]
    reference = dataset_json.get("reference")
    return [*cited, _NNUNET, *([reference] if isinstance(reference, str) and reference else [])]
