"""The command ``medmamba bench``. Light; the work is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from medmamba.command import Command, CommandError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["scan"], help="scan: the selective scan at the shapes of the shipped networks")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="backends, or reference; default: all that run")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; default: as torch chooses")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="per row (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a CSV as well")


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from medmamba.bench import scan
    from medmamba_kernels import BACKENDS

    if arguments.out is not None and not arguments.out.resolve().parent.is_dir():
        raise CommandError(f"{arguments.out.resolve().parent} is not a folder; create it or choose another --out")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise CommandError(f"--threads must be 1 or more, not {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    backends = arguments.backend or [
        name for name, module in BACKENDS.items() if module.unavailable_reason(torch.device("cpu")) is None
    ]
    unknown = [name for name in backends if name not in (*BACKENDS, "reference")]
    if unknown:
        raise CommandError(f"no backend {unknown[0]!r}; known: {', '.join(BACKENDS)}, reference")
    rows = []
    print(f"{'case':<18} {'backend':<10} {'pass':<9} {'p50 ms':>10} {'ns/elt':>8} {'floor ms':>9} {'peak MiB':>9}")
    for row in scan.run(backends, scan.select(arguments.case), arguments.seconds):
        rows.append(row)
        print(
            f"{row['case']:<18} {row['backend']:<10} {row['pass']:<9} {row['p50_ms']:>10.2f} "
            f"{row['ns_per_element']:>8.2f} {row['memory_floor_ms']:>9.2f} {row['peak_mib']:>9}",
            flush=True,
        )
    if arguments.out is not None:
        scan.write(rows, arguments.out)
        print(f"wrote {arguments.out}")
    return 0


BENCH = Command(help="time and memory of the scan on this machine", configure=_configure, run=_run)
