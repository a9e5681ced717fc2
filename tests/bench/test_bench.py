"""The scan bench: its cases are the networks' shapes, and no time is taken from what computes something else."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from medmamba import cli
from medmamba.bench import cases, measure, peers, ratios, scan
from medmamba.bench.commit import commit_of
from medmamba.command import CommandError
from medmamba_kernels.testing import SelfTest, make_problem, relative_rms

CPU = torch.device("cpu")
ODD = cases.Case("odd", (3, 4, 5), 6, 4, "raster6")


def peer_that_runs(name: str) -> peers.Peer:
    reason = peers.PEERS[name].missing(CPU)
    if reason is not None:
        pytest.skip(reason)
    return peers.PEERS[name]


def test_the_cases_hold_every_scan_of_the_six_stage_network():
    grids = {case.grid: case.channels for case in cases.network_cases("vmunet")}
    assert grids == {(32, 32, 32): 256, (16, 16, 16): 512, (8, 8, 8): 640, (4, 4, 4): 640}


def test_heads_with_routes_of_their_own_are_cases_of_their_own():
    names = [case.name for case in cases.network_cases("mhsvm")]
    assert len(names) == len(set(names)) == 4 * 4
    assert names[0] == "mhsvm 32x32x32 mhs_c6"


def test_elements_and_floor_are_counted_per_route():
    case = cases.Case("x", (2, 3, 4), 5, 16, "raster6")
    assert case.elements == 24 * 5 * 6
    assert case.exponentials == case.elements * 16
    assert case.bytes_moved == 24 * 6 * (5 * 16 + 2 * 16 * 4)


def test_time_and_memory_of_a_known_allocation():
    def allocate() -> None:
        torch.ones(2**24).sum()  # 64 MiB

    timing = measure.time_it(allocate, 0.2)
    assert timing.repeats >= 3
    assert 0 < timing.p20 <= timing.p50 <= timing.p80
    memory = measure.peak_mib(allocate)
    assert memory is None or 32 <= memory <= 256


def test_a_function_that_takes_too_long_is_timed_once():
    assert measure.time_it(lambda: torch.ones(2**20).sum(), 1e-9).repeats == 1


def test_the_cases_vary_states_routes_and_length():
    chosen = cases.all_cases()
    assert {1, 4, 16} <= {case.state_size for case in chosen}
    assert {1, 2, 4, 6, 12} == {len(case.resolved_routes) for case in chosen}
    assert {"s6", "ssd"} == {case.form for case in chosen}
    assert {512, 32768} <= {case.length for case in cases.sweep_cases()}
    assert len({case.name for case in chosen}) == len(chosen)


def test_an_ssd_case_counts_a_step_size_and_a_decay_per_head():
    case = cases.Case("x", (2, 3, 4), 8, 16, "raster6", form="ssd", head_size=4)
    assert case.heads == 2
    assert case.exponentials == 24 * 6 * 2
    assert case.bytes_moved == 24 * 6 * 4 * (3 * 8 + 2 + 2 * 16)


def test_an_ssd_case_is_an_ssd_problem():
    case = replace(ODD, form="ssd", head_size=3)
    assert case.problem().A.shape == (6, 2)
    rows = list(scan.run(["torch"], {"published": "checked"}, [case], 0.01))
    assert [(row["backend"], row["form"], bool(row["note"])) for row in rows] == [
        ("torch", "ssd", False),
        ("torch", "ssd", False),
        ("published", "ssd", True),
        ("published", "ssd", True),
    ]


def test_a_backend_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(scan, "self_test", lambda backend, device: SelfTest(1e-3, False))
    with pytest.raises(CommandError, match="fails its self-test"):
        next(scan.run(["torch"], {}, [ODD], 0.01))


@pytest.mark.parametrize("name", ["published", "mambapy"])
def test_a_peer_computes_the_scan_and_its_gradients(name):
    assert peer_that_runs(name).check(CPU) is None


@pytest.mark.bench
def test_the_compiled_peer_computes_the_scan_and_its_gradients():
    assert peer_that_runs("compiled").check(CPU) is None


def test_the_chunks_of_the_compiled_peer_are_the_scan(monkeypatch):
    monkeypatch.setattr(peers, "_compiled_parts", lambda: (peers._local_ends, peers._outputs))
    assert peers.PEERS["compiled"].check(CPU) is None


def test_a_peer_that_is_wrong_is_left_out_or_refused_by_name(monkeypatch, capsys):
    wrong = replace(peers.PEERS["published"], scan=lambda x, s: peers._published(1.001 * x, s))
    monkeypatch.setitem(peers.PEERS, "published", wrong)
    problem = wrong.check(CPU)
    assert problem is not None
    assert "its y differs" in problem
    arguments = ["bench", "scan", "--case", "odd", "--backend", "torch", "--seconds", "0.01"]
    assert cli.main([*arguments, "--peers", "published"]) == 2
    assert "peer published cannot be timed: its y differs" in capsys.readouterr().err
    monkeypatch.setattr(peers, "PEERS", {"published": wrong})
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "peer published is left out: its y differs" in output
    assert "peers against" not in output


@pytest.mark.parametrize("routes", [("dhw",), ("whd:reverse",), "raster12"], ids=str)
@pytest.mark.parametrize("channels_first", [False, True], ids=["channels last", "channels first"])
def test_copies_follow_the_routes_and_merging_is_the_adjoint(routes, channels_first):
    problem = make_problem((2, 3, 4), channels=5, routes=routes)
    sequences = peers.Sequences.of(problem, channels_first)
    how = (problem.routes, problem.grid, sequences.first_axis)
    copies = peers._copies(sequences.x, *how)
    along = copies.mT if channels_first else copies
    for k, route in enumerate(problem.routes):
        assert torch.equal(along[:, k], problem.x[:, route.order(problem.grid)])
    other = torch.randn_like(copies)
    merged = peers._sum_of_copies(other, *how)
    torch.testing.assert_close((copies * other).sum(), (sequences.x * merged).sum())


@pytest.mark.parametrize("routes", [("dhw",), ("hwd",), "raster6"], ids=str)
def test_the_passes_of_a_peer_are_those_of_the_problem(routes):
    problem = make_problem((2, 3, 5), channels=4, routes=routes, dtype=torch.float32)
    passes = peers.peer_passes(problem, peers.PEERS["published"])
    y = passes["forward"]()
    assert relative_rms(y.mT, problem.run("reference")) < 1e-6
    dx, *_ = passes["training"]()
    assert relative_rms(dx.mT, problem.run_with_gradients("reference", {"y": torch.ones_like(problem.x)})["x"]) < 1e-6


@pytest.mark.parametrize(
    ("name", "case", "pass_name", "reason"),
    [
        ("published", replace(ODD, grid=(16, 16, 16), channels=96, state_size=16), "training", "quadratic in L"),
        ("published", replace(ODD, grid=(64, 64, 64), channels=96), "forward", "a microsecond per element"),
        ("mambapy", replace(ODD, routes="line6"), "forward", "plain rasters only"),
        ("mambapy", replace(ODD, form="ssd"), "forward", "ssd form"),
        ("mambapy", replace(ODD, grid=(128, 128, 128), channels=4096, state_size=64), "forward", "GiB"),
        ("mambapy", ODD, "training", None),
        ("published", ODD, "training", None),
    ],
)
def test_what_a_peer_cannot_do_has_a_reason(name, case, pass_name, reason, monkeypatch):
    monkeypatch.setattr(peers, "available_bytes", lambda device: 2**33)
    said = peers.PEERS[name].refusal(case, pass_name)
    assert said is None if reason is None else reason in said


def test_a_case_that_a_peer_cannot_do_is_a_row_without_numbers():
    (forward, training) = scan.run_peer(replace(ODD, routes="line6"), None, peers.PEERS["published"], 0.01, CPU)
    assert forward["note"] == training["note"] == "not run: reads plain rasters only"
    assert forward["p50_ms"] == ""


def test_ratios_are_against_the_fastest_backend():
    common = {"case": "x", "pass": "forward", "note": ""}
    rows = [
        {**common, "kind": "backend", "backend": "native", "p50_ms": 2.0, "peak_mib": 1.0},
        {**common, "kind": "backend", "backend": "torch", "p50_ms": 8.0, "peak_mib": 0.5},
        {**common, "kind": "reference", "backend": "reference", "p50_ms": 1.0, "peak_mib": 0.5},
        {**common, "kind": "peer", "backend": "published", "p50_ms": 30.0, "peak_mib": 4.0},
        {**common, "kind": "peer", "backend": "mambapy", "p50_ms": "", "peak_mib": "", "note": "not run: why"},
    ]
    (entry,) = ratios.ratios(rows)
    assert entry["best"] == "native"
    assert entry["peers"] == {"published": (15.0, 4.0), "mambapy": "not run: why"}
    *_, line = ratios.lines(rows)
    assert line.split() == ["x", "forward", "native", "15,", "4", "-"]
    assert list(ratios.lines(rows[:2])) == []


def test_the_plot_comes_from_the_rows_of_a_run_or_of_its_csv(tmp_path, capsys):
    out = tmp_path / "scan.csv"
    first, second = tmp_path / "run.png", tmp_path / "csv.png"
    arguments = ["--backend", "torch", "--peers", "published", "--case", "L 512 K 1", "--seconds", "0.01"]
    assert cli.main(["bench", "scan", *arguments, "--out", str(out), "--plot", str(first)]) == 0
    assert "peers against our best backend" in capsys.readouterr().out
    assert cli.main(["bench", "scan", "--from", str(out), "--plot", str(second)]) == 0
    assert first.read_bytes()[:8] == second.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = list(csv.DictReader(out.open()))
    best, peer = (next(row for row in rows if row["kind"] == kind) for kind in ("backend", "peer"))
    (forward, _) = ratios.ratios(rows)
    assert forward["peers"]["published"][0] == float(peer["p50_ms"]) / float(best["p50_ms"])


@pytest.mark.gpu
def test_the_bench_runs_on_a_gpu(tmp_path):
    out = tmp_path / "scan.csv"
    arguments = ["--device", "cuda", "--backend", "torch", "triton", "--peers", "published", "--case", "odd"]
    assert cli.main(["bench", "scan", *arguments, "--seconds", "0.01", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert {row["backend"] for row in rows if float(row["p50_ms"]) > 0} == {"torch", "triton", "published"}
    assert {row["processor"] for row in rows} == {torch.cuda.get_device_name()}


def test_the_commit_is_that_of_the_checkout_and_says_when_it_is_changed(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, env={**os.environ, **identity})

    tracked, untracked = tmp_path / "a.py", tmp_path / "b.py"
    tracked.write_text("1")
    untracked.write_text("1")
    assert commit_of(tracked) == ""
    git("init", "--quiet")
    git("add", "a.py")
    git("commit", "--quiet", "--message", "x")
    commit = commit_of(tracked)
    assert int(commit, 16) >= 0
    assert commit_of(untracked) == ""
    tracked.write_text("2")
    assert commit_of(tracked) == f"{commit}-dirty"


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scan, "all_cases", lambda: [replace(ODD, name="odd 3x4x5")])
    monkeypatch.setitem(peers.PEERS, "published", replace(peers.PEERS["published"], most_pairs=0))
    out = tmp_path / "scan.csv"
    arguments = ["bench", "scan", "--case", "odd", "--backend", "torch", "reference", "--seconds", "0.01"]
    assert cli.main([*arguments, "--peers", "published", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [(row["backend"], row["pass"]) for row in rows] == [
        ("torch", "forward"),
        ("torch", "training"),
        ("reference", "forward"),
        ("reference", "training"),
        ("published", "forward"),
        ("published", "training"),
    ]
    assert all(row["torch"] and row["gate"] for row in rows)
    assert all(float(row["p50_ms"]) > 0 for row in rows[:5])
    assert rows[-1]["note"] == "not run: has a backward that is quadratic in L"
    assert "odd 3x4x5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cuda"], "no backend 'cuda'; known: native, torch, triton, reference"),
        (["--case", "nothing"], "no case contains 'nothing'; known: "),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--out", "/nowhere/x.csv"], "is not a folder"),
        (["--plot", "/nowhere/x.png"], "is not a folder"),
        (["--peers", "flash"], "no peer 'flash'; known: published, mambapy, compiled, mamba_ssm"),
        (["--peers", "mamba_ssm"], "peer mamba_ssm cannot be timed: mamba_ssm needs a CUDA device"),
        (["--device", "meta"], "--device must be cpu or cuda"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--device", "nothing"], "--device must be cpu or cuda"),
        (["--from", "x.csv"], "--from needs --plot"),
        (["--from", "nowhere.csv", "--plot", "x.png"], "nowhere.csv is not a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["bench", "scan", *arguments]) == 2
    assert message in capsys.readouterr().err
