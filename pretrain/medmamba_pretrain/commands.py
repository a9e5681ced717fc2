"""The command ``medmamba pretrain`` and its actions. Light; the work is imported when they run."""

from __future__ import annotations

import argparse

from medmamba.command import Command
from medmamba_pretrain.corpus.commands import CORPUS, INGEST
from medmamba_pretrain.loop.commands import RUN

#: ``medmamba pretrain NAME``, in the order of their use.
ACTIONS = {"ingest": INGEST, "corpus": CORPUS, "run": RUN}


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, action in ACTIONS.items():
        subparser = actions.add_parser(name, help=action.help, description=action.help, epilog=parser.epilog)
        action.configure(subparser)
        subparser.set_defaults(run_action=action.run)


def _run(arguments: argparse.Namespace) -> int:
    exit_code: int = arguments.run_action(arguments)
    return exit_code


PRETRAIN = Command(help="masked pretraining on unlabelled images", configure=_configure, run=_run)
