"""``medmamba pretrain ingest`` and ``medmamba pretrain corpus``. Light; the work is imported when they run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.command import Command, CommandError

if TYPE_CHECKING:
    from .exclusion import Exclusion
    from .settings import Settings
    from .sources import Source
    from .store import Store


def _configure_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help="folders with images, searched to any depth; LABEL=FOLDER gives one a name (else: its last two parts)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the store, new or not")
    parser.add_argument(
        "--modality", choices=("ct", "mr"), default="ct", metavar="NAME", help="ct (values are HU) or mr (default: ct)"
    )
    parser.add_argument(
        "--spacing",
        type=float,
        nargs="+",
        metavar="MM",
        help="of the stored volumes: one number, or three along superior, anterior, right; default: 1.5",
    )
    parser.add_argument(
        "--patients",
        default="file",
        metavar="RULE",
        help="whose scan it is, where DICOM does not say: file, folder or regex:PATTERN (default: file)",
    )
    parser.add_argument(
        "--list-exclude",
        type=Path,
        metavar="FILE",
        help="what stays out, with all copies: paths, patients or content hashes, one per line",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: one per core")
    parser.add_argument(
        "--engine",
        choices=("joblib", "dask"),
        default="joblib",
        metavar="NAME",
        help="joblib or, for a cluster, dask (default: joblib)",
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of Dask, e.g. tcp://10.0.0.1:8786")
    parser.add_argument("--dry-run", action="store_true", help="list what would be read; read and write nothing")
    parser.add_argument("--strict", action="store_true", help="exit code 3 when images were rejected, 4 when all were")


def _ingest(arguments: argparse.Namespace) -> int:
    from . import sources
    from .engine import Engine
    from .exclusion import read_list
    from .ingest import ingest, plan
    from .progress import Progress
    from .store import MANIFEST, Store

    settings = _settings(arguments)
    jobs = arguments.jobs if arguments.jobs is not None else _cores()
    if jobs < 1:
        raise CommandError(f"--jobs {jobs}: at least 1")
    inputs = sources.parse_inputs(arguments.inputs)
    found = sources.find_sources(inputs, but_not=arguments.out)
    if not found:
        raise CommandError(f"no image below {', '.join(arguments.inputs)}; NIfTI, MetaImage, NRRD and DICOM are read")
    exclusion = read_list(arguments.list_exclude, inputs, found)
    if arguments.dry_run:
        return _show_plan(arguments.out, found, exclusion)
    store = Store.create(arguments.out, settings)
    with store.writing():
        todo = plan(store, found, exclusion)
        with Progress(len(todo.read) + len(todo.excluded)) as progress:
            counts = ingest(store, todo, exclusion, Engine(arguments.engine, jobs, arguments.scheduler), progress.add)
    if todo.done:
        print(f"{len(todo.done)} images were done already")
    unmatched = exclusion.unmatched({record.patient for record in store.records.values()}, store.salt)
    if unmatched:
        print(f"{len(unmatched)} entries of {arguments.list_exclude} match nothing, e.g. {', '.join(unmatched[:5])}")
    _print_summary(store)
    print(f"manifest: {arguments.out / MANIFEST}")
    if not arguments.strict or not counts["rejected"]:
        return 0
    return 4 if counts["rejected"] == counts.total() else 3


def _show_plan(folder: Path, found: list[Source], exclusion: Exclusion) -> int:
    from .ingest import Plan, plan
    from .store import MANIFEST, Store

    if (folder / MANIFEST).exists():
        todo = plan(Store(folder), found, exclusion)
    else:
        out = exclusion.keys
        todo = Plan([s for s in found if s.key not in out], [s for s in found if s.key in out])
    for word, sources in (("read", todo.read), ("exclude", todo.excluded), ("done", todo.done)):
        for source in sources:
            print(f"{word:<8} {source.kind:<10} {source.key}")
    print(f"{len(todo.read)} to read, {len(todo.excluded)} to exclude, {len(todo.done)} done; nothing was written")
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    from .patients import check_rule
    from .settings import DEFAULT_SPACING_MM, Settings

    given = arguments.spacing or [DEFAULT_SPACING_MM]
    spacing = given * 3 if len(given) == 1 else given
    if len(spacing) != 3 or not all(0.1 <= size <= 20 for size in spacing):
        raise CommandError(f"--spacing {given}: one number or three, each from 0.1 to 20 mm")
    return Settings(arguments.modality, (spacing[0], spacing[1], spacing[2]), check_rule(arguments.patients))


def _cores() -> int:
    """Cores that this process may use: fewer than the machine has, in a container or under a scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print_summary(store: Store) -> None:
    from .summary import summarise

    summary = summarise(store)
    print(", ".join(f"{count} {name}" for name, count in sorted(summary.statuses.items())) or "no images")
    for code, count in sorted(summary.codes.items()):
        print(f"  {code}: {count}")
    print(
        f"{summary.volumes} volumes of {summary.patients} patients, {summary.voxels / 1e6:,.1f} million voxels, "
        f"{summary.size_bytes / 2**20:,.1f} MiB"
    )


def _configure_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="written by `medmamba pretrain ingest`")
    parser.add_argument("--rejected", action="store_true", help="list what was not accepted, with the reason")
    parser.add_argument("--verify", action="store_true", help="decompress every volume and compare it with its hash")


def _corpus(arguments: argparse.Namespace) -> int:
    from .store import Store
    from .summary import verify

    store = Store(arguments.store)
    settings = store.settings
    spacing = " x ".join(f"{size:g}" for size in settings.spacing_mm)
    print(f"{store.folder}: {settings.modality}, {spacing} mm (superior, anterior, right)")
    _print_summary(store)
    if store.torn:
        print(f"{store.torn} broken lines in the manifest; the next ingest reads their images again")
    if arguments.rejected:
        for record in store.records.values():
            if record.status != "accepted":
                print(f"{record.status} {record.source}: {record.code}: {record.reason}")
    if not arguments.verify:
        return 0
    results = list(verify(store))
    wrong = [text for _, text in results if text]
    print("\n".join([*wrong, f"{len(results) - len(wrong)} of {len(results)} volumes hold what the manifest says"]))
    if not wrong:
        return 0
    return 4 if len(wrong) == len(results) else 3


INGEST = Command(
    help="check images, and store them as equally spaced int16 volumes to pretrain on",
    configure=_configure_ingest,
    run=_ingest,
)
CORPUS = Command(help="what a store holds, and whether its files are sound", configure=_configure_corpus, run=_corpus)
