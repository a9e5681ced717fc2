"""What ``medmamba train`` takes beyond the arguments of ``nnUNetv2_train``; for the latter they are variables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmamba.command import CommandError
from medmamba.training.settings import REHEARSAL, RESTART, SAVE_MINUTES, SEED, TEACHER, minutes_from, seed_from

#: What goes before the help of nnU-Net's command.
HELP = f"""medmamba train takes what nnUNetv2_train takes, see below, and
  --restart           begin anew; checkpoints of an earlier training are moved into a folder beside ({RESTART}=1)
  --seed N            make the training repeatable ({SEED}=N)
  --save-minutes M    save a checkpoint every M minutes, default 15, besides those of nnU-Net ({SAVE_MINUTES}=M)
  --no-rehearsal      leave out the two iterations, the checkpoint and the export before epoch 0 ({REHEARSAL}=0)
  --teacher FOLDER    where the teacher of a student is, if not where its plans say ({TEACHER}=FOLDER)
A training that was begun in the same folder continues, with and without --c.
"""


def take(arguments: Sequence[str]) -> list[str]:
    """Set the variables of this process by our options, and return the other arguments, in order.

    Raises:
        CommandError: a value that does not fit, or ``--restart`` beside ``--c``.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--seed", metavar="N")
    parser.add_argument("--save-minutes", metavar="M")
    parser.add_argument("--no-rehearsal", action="store_true")
    parser.add_argument("--teacher", metavar="FOLDER")
    ours, others = parser.parse_known_args(list(arguments))
    if ours.restart and "--c" in others:
        raise CommandError("--restart begins anew and --c continues; leave one of them out")
    chosen: dict[str, str] = {}
    if ours.restart:
        chosen[RESTART] = "1"
    if ours.seed is not None:
        chosen[SEED] = str(seed_from("--seed", ours.seed))
    if ours.save_minutes is not None:
        chosen[SAVE_MINUTES] = str(minutes_from("--save-minutes", ours.save_minutes))
    if ours.no_rehearsal:
        chosen[REHEARSAL] = "0"
    if ours.teacher is not None:
        if not Path(ours.teacher).is_dir():
            raise CommandError(f"--teacher {ours.teacher} is not a folder; give the trained folder of the teacher")
        chosen[TEACHER] = ours.teacher
    os.environ.update(chosen)
    return others


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise CommandError(message)
