"""The command ``new-mixer``. Light; the work is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from medmamba.command import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of mixer, core and package, e.g. ema3d")
    parser.add_argument("-o", dest="folder", type=Path, metavar="FOLDER", help="new or empty; default: NAME")


def _run(arguments: argparse.Namespace) -> int:
    from medmamba.mixers import CORES
    from medmamba.new_mixer.package import check_name, write_package
    from medmamba.presets import MIXERS

    name = arguments.name
    check_name(name, {*MIXERS, *CORES})
    folder = arguments.folder or Path(name)
    for path in write_package(name, folder):
        print(f"wrote {path}")
    print(
        f"next: pip install --no-deps --no-build-isolation -e {folder} && medmamba doctor --mixer {name}\n"
        f"then put your own mathematics into {folder / 'src' / name / '__init__.py'}"
    )
    return 0


NEW_MIXER = Command(
    help="write the beginning of a package that adds a token mixer of your own", configure=_configure, run=_run
)
