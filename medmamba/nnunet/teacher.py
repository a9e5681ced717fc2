"""A teacher: trained folds of nnU-Net, of ours or a stock network, that answer on the patches of a student.

Checkpoints are read without running code from them, and must be the ones that the plans name, by their SHA-256. What
the teacher was trained on is read from its checkpoints, so that the checksum covers it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.inference.model.architecture import build, check_architecture
from medmamba.inference.model.problems import ModelRefused
from medmamba.inference.model.run import TRAINERS_THAT_FOLLOW_PLANS, Fold, Run, find_run, read_fold
from medmamba.inference.model.tensors import check_finite, check_fit, facts
from medmamba.nnunet import folders
from medmamba.nnunet.architecture import ArchitectureError, check_patch
from medmamba.nnunet.distillation import Distillation
from medmamba.nnunet.errors import UserFacingError
from medmamba.nnunet.task import Task, differences
from medmamba.training.checkpoints import BEST, FINAL
from medmamba.training.settings import TEACHER, teacher_folder

_FOLD = re.compile(r"fold_(\d+|all)", re.ASCII)
_RESULTS = "nnUNet_results"


class TeacherError(UserFacingError, ValueError):
    """A trained folder cannot teach; the text says why and what to do."""


class Teacher:
    """Networks that answer on patches, in evaluation mode and without gradients.

    Args:
        networks: one for each fold, which give logits, or a list of them, finest first.
        num_heads: of every network: how many of its heads were trained; the others are not asked.
    """

    def __init__(self, networks: Sequence[nn.Module], num_heads: Sequence[int]) -> None:
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self._num_heads = list(num_heads)

    @torch.no_grad()
    def answers(self, data: Tensor) -> list[list[Tensor]]:
        """Logits (B, C, *spatial) of every network to patches (B, channels, *spatial), by head, finest first."""
        return [
            [outputs] if isinstance(outputs, Tensor) else list(outputs[:number])
            for outputs, number in zip((network(data) for network in self.networks), self._num_heads, strict=True)
        ]


@dataclass(frozen=True)
class ChosenTeacher:
    """A teacher for plans that are about to be written.

    Attributes:
        distillation: entry for the plans.
        folds: what its checkpoints say, without their weights.
    """

    distillation: Distillation
    folds: Sequence[Fold]

    @property
    def configuration(self) -> str:
        """That the teacher was trained on."""
        return self.folds[0].configuration

    def check(self, student: Task, name: str) -> None:
        """Raise unless it can teach a student.

        Args:
            student: to be taught.
            name: of its configuration, for the text.

        Raises:
            TeacherError: as :func:`check_teacher`.
        """
        for fold in self.folds:
            check_teacher(fold, student, f"{self.distillation.teacher} for {name}")


def choose_teacher(folder: Path, **values: float) -> ChosenTeacher:
    """A teacher by its folder.

    Args:
        folder: a trained folder with its folds, or one of the folds. ``checkpoint_final.pth`` is taken, or
            ``checkpoint_best.pth`` where no fold is finished.
        values: ``weight`` and ``temperature``, where they are not the usual ones.

    Raises:
        TeacherError: there is no checkpoint, or it cannot be read without running code.
        DistillationError: a value out of range.
    """
    run = _find(folder)
    content = [replace(_read(run, fold), weights={}) for fold in run.folds]
    sums = {fold: _sha256(run.path(fold)) for fold in run.folds}
    return ChosenTeacher(Distillation(_place(run.folder), run.checkpoint, sums, **values), content)


def check_teacher(fold: Fold, student: Task, name: str) -> None:
    """Raise unless a checkpoint can teach a student on the student's patches.

    Args:
        fold: of the teacher.
        student: to be taught.
        name: of the teacher, for the text.

    Raises:
        TeacherError: it was trained for other labels, channels, spacing or normalisation, the patch does not fit its
            strides, or its network is not the one that its plans name.
    """
    if fold.trainer_of_network not in TRAINERS_THAT_FOLLOW_PLANS:
        raise TeacherError(
            f"the teacher {name} was trained by {fold.trainer_of_network}, which may build another network than its "
            "plans name; choose a teacher of a stock trainer or of medmamba"
        )
    teacher = _task(fold)
    different = [f"{what} {theirs}, the student {own}" for what, theirs, own in differences(teacher, student)]
    if different:
        raise TeacherError(
            f"the teacher {name} has {'; '.join(different)}; teacher and student must read the same preprocessed data "
            "and have the same labels: choose another teacher, or plan the student from the plans of this one"
        )
    try:
        check_patch(
            student.configuration["patch_size"], teacher.configuration["architecture"]["arch_kwargs"]["strides"]
        )
    except ArchitectureError as error:
        raise TeacherError(f"the teacher {name} cannot read the patches of the student: {error}") from error


def load_teacher(distillation: Distillation, student: Task, device: torch.device) -> Teacher:
    """The teacher of the plans, from where they say or ``MEDMAMBA_TEACHER`` does.

    Raises:
        TeacherError: it is not there, is another one, cannot be read, or does not fit the student.
    """
    run = _find_again(distillation)
    networks, heads = [], []
    for fold in run.folds:
        path = run.path(fold)
        if _sha256(path) != distillation.sha256[fold]:
            raise TeacherError(
                f"{path} is another checkpoint than the one that the plans name (its SHA-256 differs); restore it, say "
                f"where the right one is (medmamba train --teacher FOLDER, {TEACHER}), or plan again with --teacher"
            )
        content = _read(run, fold)
        check_teacher(content, student, str(path))
        networks.append(_network(content, student, path).to(device))
        heads.append(_num_trained_heads(content))
    return Teacher(networks, heads)


def _find(folder: Path) -> Run:
    """The checkpoints of a trained folder, or of one of its folds."""
    run_folder, fold = _split(folder)
    problems: list[ModelRefused] = []
    for checkpoint in (FINAL, BEST):
        try:
            return find_run(run_folder, None if fold is None else [fold], checkpoint)
        except ModelRefused as error:
            problems.append(error)
    if problems[0].code != "MM-MD-031":
        raise TeacherError(f"no teacher: {problems[0].text}")
    raise TeacherError(f"{folder} has no {FINAL} and no {BEST} to teach with; train it first, or choose another fold")


def _find_again(distillation: Distillation) -> Run:
    chosen = teacher_folder()
    folder = Path(distillation.teacher)
    if chosen is not None:
        folder, _ = _split(chosen)
    elif not folder.is_absolute():
        folder = (folders.folder_or_none(_RESULTS) or Path.cwd()) / folder
    try:
        return find_run(folder, list(distillation.sha256), distillation.checkpoint)
    except ModelRefused as error:
        raise TeacherError(
            f"the teacher of the plans, {distillation.teacher}, is not there ({error.text}); if it moved, give its "
            f"folder with `medmamba train --teacher FOLDER` or {TEACHER}=FOLDER"
        ) from error


def _split(folder: Path) -> tuple[Path, str | None]:
    """Trained folder, and the fold where one is named."""
    folder = folder.absolute()
    match = _FOLD.fullmatch(folder.name)
    return (folder.parent, match[1]) if match else (folder, None)


def _place(folder: Path) -> str:
    """How plans name a trained folder: relative to nnUNet_results, so that they say nothing about a machine."""
    results = folders.folder_or_none(_RESULTS)
    if results is not None and folder.is_relative_to(results.absolute()):
        return folder.relative_to(results.absolute()).as_posix()
    return str(folder)


def _read(run: Run, fold: str) -> Fold:
    """A checkpoint; where it says nothing about its training, the JSON files of its folder do."""
    try:
        content = read_fold(run, fold)
    except ModelRefused as error:
        raise TeacherError(f"no teacher: {error.text}") from error
    return replace(content, plans=content.plans or run.plans, dataset_json=content.dataset_json or run.dataset_json)


def _task(fold: Fold) -> Task:
    return Task.of(fold.plans, fold.configuration, fold.dataset_json)


def _network(fold: Fold, student: Task, path: Path) -> nn.Module:
    """The network of a checkpoint; torch's random state stays as it is."""
    teacher = _task(fold)
    block = json.loads(json.dumps(teacher.configuration["architecture"]))
    try:
        check_architecture(block, "architecture", student.configuration["patch_size"])
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            network = build(block, *teacher.ends)
        check_fit(path, facts(fold.weights), facts(network.state_dict()))
        for key, tensor in fold.weights.items():
            check_finite(path, key, tensor)
    except ModelRefused as error:
        raise TeacherError(f"the network of the teacher {path} cannot be built: {error.text}") from error
    network.load_state_dict(fold.weights)
    if _num_trained_heads(fold) > 1:
        decoder: Any = network.decoder
        decoder.deep_supervision = True
    return network


def _num_trained_heads(fold: Fold) -> int:
    """Heads with a weight in the loss: nnU-Net gives the coarsest none."""
    strides = _task(fold).configuration["architecture"]["arch_kwargs"]["strides"]
    return 1 if "NoDeepSupervision" in fold.trainer else max(1, len(strides) - 2)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
