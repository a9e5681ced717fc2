"""The command ``medmamba info``. Light; the work is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from medmamba.command import Command, CommandError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "network",
        nargs="?",
        metavar="NETWORK",
        help="e.g. vmunet; default: the one that the plans name; or the folder of a model package, without options",
    )
    parser.add_argument(
        "--plans",
        type=Path,
        metavar="FILE",
        help="plans file of nnU-Net, stock or ours; default: the checkpoint's, or a patch of 128 cubed",
    )
    parser.add_argument(
        "--configuration", metavar="NAME", help="of the plans; default: the checkpoint's, 3d_fullres, or the first"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of a training, or a plain state dict")
    parser.add_argument("--routes", nargs="+", metavar="ROUTE", help="a route set, or routes, in place of the plan's")
    parser.add_argument(
        "--dt-init",
        choices=["default", "route"],
        metavar="RULE",
        help="step sizes of the scans at initialisation: default (Mamba's) or route (from its length and spacing)",
    )
    parser.add_argument("--input-channels", type=int, metavar="N", help="default: as dataset.json says, or 1")
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: as dataset.json says, or 2")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="mean step sizes on a patch of standard normal noise (a forward pass, minutes on a CPU)",
    )
    parser.add_argument("--by-route", action="store_true", help="one line per route of every scan")
    parser.add_argument("--horizon", type=Path, metavar="PNG", help="draw influence against distance")


def _run(arguments: argparse.Namespace) -> int:
    from medmamba.info import report
    from medmamba.info.subject import Wish, find_subject
    from medmamba.networks import NETWORKS

    if arguments.network is not None and arguments.network not in NETWORKS and _is_place(arguments.network):
        return _describe_package(arguments)
    if arguments.horizon is not None and not arguments.horizon.resolve().parent.is_dir():
        raise CommandError(f"{arguments.horizon.resolve().parent} is not a folder; create it or choose another place")
    subject = find_subject(
        Wish(
            network=arguments.network,
            plans=arguments.plans,
            configuration=arguments.configuration,
            checkpoint=arguments.checkpoint,
            routes=arguments.routes,
            dt_init=arguments.dt_init,
            input_channels=arguments.input_channels,
            num_classes=arguments.num_classes,
        )
    )
    scans = report.scans_of(subject, measure=arguments.measure)
    print(report.heading(subject, scans))
    if not scans:
        print("no scans: this is a control, or a network without any")
        return 0
    print()
    for line in report.table(scans, by_route=arguments.by_route):
        print(line)
    if arguments.horizon is not None:
        from medmamba.info.plot import draw

        draw(scans, report.heading(subject, scans).partition("\n")[0], arguments.horizon)
        print(f"\nwrote {arguments.horizon}")
    return 0


def _is_place(text: str) -> bool:
    return Path(text).is_dir() or Path(text).name != text


def _describe_package(arguments: argparse.Namespace) -> int:
    from medmamba.info.package import describe

    options = [name for name, value in vars(arguments).items() if name != "network" and value]
    if options:
        raise CommandError(
            f"{arguments.network} is no network, so a model package, which takes no --{options[0].replace('_', '-')}; "
            "leave it out"
        )
    for line in describe(Path(arguments.network)):
        print(line)
    return 0


INFO = Command(
    help="parameters, work and memory of a network and how far its scans remember; or what a model package is",
    configure=_configure,
    run=_run,
)
