"""``medmamba plan --teacher``: plans for a student. Light; the work is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import CommandError

if TYPE_CHECKING:
    from medmamba.nnunet.teacher import ChosenTeacher


def configure(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of the command."""
    group.add_argument(
        "--teacher",
        type=Path,
        metavar="FOLDER",
        help="trained folder of nnU-Net (all its folds, averaged), or one fold_X in it; -c is then its configuration",
    )
    group.add_argument(
        "--distill-weight", type=float, metavar="W", help="share of the teacher in the loss, 0 to 1 (default 0.5)"
    )
    group.add_argument(
        "--distill-temperature", type=float, metavar="T", help="softens what teacher and student say (default 2)"
    )


def chosen_teacher(arguments: argparse.Namespace) -> ChosenTeacher | None:
    """The teacher that the arguments name, its checkpoints read.

    Raises:
        CommandError: a weight or temperature without a teacher.
        TeacherError, DistillationError: it cannot teach, or a value is out of range.
    """
    values = {"weight": arguments.distill_weight, "temperature": arguments.distill_temperature}
    given = {name: value for name, value in values.items() if value is not None}
    if arguments.teacher is None:
        if given:
            raise CommandError(
                f"--distill-{next(iter(given))} is for a student; name its teacher with --teacher FOLDER"
            )
        return None
    from medmamba.nnunet.teacher import choose_teacher

    return choose_teacher(arguments.teacher, **given)


def check_student(
    chosen: ChosenTeacher, plans: Mapping[str, Any], dataset_json: Mapping[str, Any], configurations: Sequence[str]
) -> None:
    """Raise unless the teacher can teach these configurations.

    Raises:
        TeacherError: labels, channels, spacing, normalisation or patch do not fit.
    """
    from medmamba.nnunet.task import Task

    for name in configurations:
        chosen.check(Task.of(plans, name, dataset_json), name)
