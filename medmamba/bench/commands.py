"""The command ``medmamba bench``. Light; the work is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import Command, CommandError

if TYPE_CHECKING:
    import torch


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["scan", "cores", "mixers"],
        help="scan: the selective scan at the shapes of the shipped networks; cores: every core beside convolutions; "
        "mixers: a block of every published mixer beside a convolution",
    )
    parser.add_argument("--core", nargs="+", metavar="NAME", help="of cores: which; default: all")
    parser.add_argument("--mixer", nargs="+", metavar="NAME", help="of mixers: which; default: all")
    parser.add_argument(
        "--backend", nargs="+", metavar="NAME", help="of scan: backends, or reference; default: all that run"
    )
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="of scan: other libraries; default: all that are installed"
    )
    parser.add_argument("--no-peers", action="store_true", help="of scan: time our own backends only")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; default: as torch chooses")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="per row (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a CSV as well")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="of scan: write a PNG of time and memory over length as well"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="of scan: plot this CSV, measure nothing"
    )


def _run(arguments: argparse.Namespace) -> int:
    for path in (arguments.out, arguments.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise CommandError(f"{path.resolve().parent} is not a folder; create it or choose another place")
    _refuse_options_of_others(arguments)
    if arguments.source is not None:
        return _plot_only(arguments)
    import torch

    device = _device(arguments.device)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise CommandError(f"--threads must be 1 or more, not {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    return _run_scan(arguments, device) if arguments.what == "scan" else _run_volumes(arguments, device)


#: Options that only one kind of bench takes.
_OWN = {"scan": ("backend", "peers", "no_peers", "plot", "source"), "cores": ("core",), "mixers": ("mixer",)}


def _refuse_options_of_others(arguments: argparse.Namespace) -> None:
    for name in (name for what, names in _OWN.items() if what != arguments.what for name in names):
        if getattr(arguments, name):
            spelling = "from" if name == "source" else name.replace("_", "-")
            raise CommandError(f"bench {arguments.what} takes no --{spelling}")


def _run_scan(arguments: argparse.Namespace, device: torch.device) -> int:
    from medmamba.bench import ratios, scan
    from medmamba.bench.rows import machine

    backends = _backends(arguments.backend, device)
    cases = scan.select(arguments.case)
    peers = _peers(arguments, device)
    print(f"{'case':<18} {'backend':<10} {'pass':<9} {'p50 ms':>10} {'ns/elt':>8} {'floor ms':>9} {'peak MiB':>9}")
    rows = _collect(scan.run(backends, peers, cases, arguments.seconds, device), _scan_line, arguments.out, device)
    print(*ratios.lines(rows), sep="\n")
    if arguments.plot is not None:
        facts = machine(device)
        _plot([{**row, **facts} for row in rows], arguments.plot)
    return 0


def _run_volumes(arguments: argparse.Namespace, device: torch.device) -> int:
    from medmamba.bench import cores, mixers, volumes

    bench, wanted = (cores, arguments.core) if arguments.what == "cores" else (mixers, arguments.mixer)
    names, cases = bench.select(wanted, arguments.case)
    print(
        f"{'case':<18} {'contender':<16} {'layout':<13} {'pass':<9} {'p50 ms':>10} {'floor ms':>9} {'MMAC':>9} "
        f"{'peak MiB':>9}"
    )
    rows = _collect(bench.run(names, cases, arguments.seconds, device), _volume_line, arguments.out, device)
    print(*volumes.lines(rows), sep="\n")
    return 0


def _collect(
    run: Iterator[dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
    out: Path | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Print every row as it comes, and write all; what was measured before an interruption or an error is kept."""
    from medmamba.bench.rows import write

    rows: list[dict[str, Any]] = []
    try:
        for row in run:
            rows.append(row)
            print(line(row), flush=True)
    finally:
        if rows and out is not None:
            write(rows, out, device)
            print(f"wrote {out}")
    return rows


def _scan_line(row: dict[str, Any]) -> str:
    start = f"{row['case']:<18} {row['backend']:<10} {row['pass']:<9}"
    if row["note"]:
        return f"{start} {row['note']}"
    return (
        f"{start} {row['p50_ms']:>10.3f} {row['ns_per_element']:>8.4g} {row['memory_floor_ms']:>9.3g} "
        f"{row['peak_mib']:>9}"
    )


def _volume_line(row: dict[str, Any]) -> str:
    start = f"{row['case']:<18} {row['contender']:<16} {row['layout']:<13} {row['pass']:<9}"
    if row["note"]:
        return f"{start} {row['note']}"
    return (
        f"{start} {row['p50_ms']:>10.3f} {row['memory_floor_ms']:>9.3g} {row['mega_macs']:>9.5g} {row['peak_mib']:>9}"
    )


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, not {name}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise CommandError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
        # Events and launches go to the current device.
        torch.cuda.set_device(device)
    return device


def _backends(requested: Sequence[str] | None, device: torch.device) -> list[str]:
    from medmamba_kernels import BACKENDS

    names = list(requested or [name for name, module in BACKENDS.items() if module.unavailable_reason(device) is None])
    for name in names:
        if name not in (*BACKENDS, "reference"):
            raise CommandError(f"no backend {name!r}; known: {', '.join(BACKENDS)}, reference")
    return names


def _peers(arguments: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """Peers that are there and right, with what their rows say of the check. One named by the user must be both."""
    from medmamba.bench import scan
    from medmamba.bench.peers import PEERS

    if arguments.no_peers:
        return {}
    for name in arguments.peers or []:
        if name not in PEERS:
            raise CommandError(f"no peer {name!r}; known: {', '.join(PEERS)}")
    peers = {}
    for name, problem, verdict in scan.check_peers(arguments.peers or list(PEERS), device):
        if problem is None:
            peers[name] = verdict
            print(f"peer {name}: {verdict}", flush=True)
        elif arguments.peers:
            raise CommandError(f"peer {name} cannot be timed: {problem}")
        else:
            print(f"peer {name} is left out: {problem}", flush=True)
    return peers


def _plot_only(arguments: argparse.Namespace) -> int:
    from medmamba.bench.rows import read

    if arguments.plot is None:
        raise CommandError("--from needs --plot FILE: it plots a CSV and measures nothing")
    if not arguments.source.is_file():
        raise CommandError(f"{arguments.source} is not a file; --from wants a CSV that --out wrote")
    _plot(read(arguments.source), arguments.plot)
    return 0


def _plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    from medmamba.bench import plot

    plot.plot(rows, out)
    print(f"wrote {out}")


BENCH = Command(
    help="time and memory of the scan, of its alternatives and of every mixer on this machine",
    configure=_configure,
    run=_run,
)
