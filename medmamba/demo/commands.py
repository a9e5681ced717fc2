"""The command ``medmamba demo``. Light; the work is imported when it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from medmamba.command import Command, CommandError
from medmamba.demo.settings import Settings


def _configure(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="your own volumes in nnU-Net raw layout; the last two cases stay unseen "
        "(default: eight hippocampus MRIs that come with medmamba, CC BY-SA 4.0)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("medmamba-demo"),
        metavar="DIR",
        help="folder for everything; a second run replaces the files of the first (default: %(default)s)",
    )
    parser.add_argument(
        "--network",
        default=defaults.network,
        metavar="NAME",
        help="network, in its small variant (default: %(default)s)",
    )
    parser.add_argument(
        "--iterations",
        type=_positive,
        default=defaults.iterations,
        metavar="N",
        help="steps of training, from 20 on rounded up to a multiple of 20 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=defaults.seed,
        metavar="N",
        help="for weights, patches and augmentation (default: %(default)s)",
    )


def _run(arguments: argparse.Namespace) -> int:
    # Threads that sleep while they wait: on a machine with other work, OpenMP's usual busy waiting makes a step of the
    # training twice as slow. Read when torch is loaded, that is below.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from medmamba.demo.run import EXPECTED_DICE, run_demo

    settings = Settings(network=arguments.network, iterations=arguments.iterations, seed=arguments.seed)
    result = run_demo(arguments.out, arguments.data, settings)
    if not result.is_as_expected:
        raise CommandError(
            f"mean Dice {result.scores.mean.dice:.3f} is below {EXPECTED_DICE}, which this demo should reach; run "
            f"`medmamba doctor` and look into {result.folder / 'log.txt'}",
            exit_code=1,
        )
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 .. {2**32 - 1}")
    return value


DEMO = Command(
    help="train and test a small network on eight real MRIs in a few minutes, on any CPU",
    configure=_configure,
    run=_run,
)
