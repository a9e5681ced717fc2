"""``medmamba pretrain run``. Light; the work is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from medmamba.command import Command, CommandError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, e.g. ct-small, or a .toml file")
    parser.add_argument("--corpus", type=Path, required=True, metavar="STORE", help="of `medmamba pretrain ingest`")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new, or of a run of this recipe, which goes on"
    )
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change an entry of the recipe, e.g. steps=1000 or arguments.d_state=8; can be repeated",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), metavar="NAME", help="cpu or cuda; default: a GPU if any")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read crops, per process that trains")
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=0,
        metavar="N",
        help="crops of one forward pass; gradients are added up to the recipe's batch (default: all at once)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from medmamba.stop import StopRequest
    from medmamba_pretrain.recipe import read_recipe

    from .processes import join_processes
    from .train import Machine, run

    if arguments.micro_batch < 0 or (arguments.workers or 0) < 0:
        raise CommandError("--micro-batch and --workers must be 0 or more")
    recipe = read_recipe(arguments.recipe, arguments.changes)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{arguments.out} cannot be written ({error.strerror}); choose another --out") from error
    with StopRequest() as stop, join_processes(arguments.device) as processes:
        workers = arguments.workers if arguments.workers is not None else _workers(processes.device.type)
        machine = Machine(workers=workers, micro_batch=arguments.micro_batch)
        return run(recipe, arguments.corpus, arguments.out, processes=processes, machine=machine, stop=stop)


def _workers(device: str) -> int:
    """A CPU that trains has no core to spare; beside a GPU two processes read more crops than it can take."""
    return 0 if device == "cpu" else 2


RUN = Command(help="pretrain an encoder on a corpus, or go on with it", configure=_configure, run=_run)
