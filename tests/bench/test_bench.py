"""The scan bench: its cases are the networks' shapes, and no time is taken from a wrong backend."""

from __future__ import annotations

import csv

import pytest
import torch

from medmamba import cli
from medmamba.bench import cases, measure, scan
from medmamba.command import CommandError
from medmamba_kernels.testing import SelfTest


def test_the_cases_hold_every_scan_of_the_six_stage_network():
    grids = {case.grid: case.channels for case in cases.network_cases("vmunet")}
    assert grids == {(32, 32, 32): 256, (16, 16, 16): 512, (8, 8, 8): 640, (4, 4, 4): 640}


def test_elements_and_floor_are_counted_per_route():
    case = cases.Case("x", (2, 3, 4), 5, 16, "raster6")
    assert case.elements == 24 * 5 * 6
    assert case.exponentials == case.elements * 16
    assert case.bytes_moved == 24 * 6 * (5 * 16 + 2 * 16 * 4)


def test_time_and_memory_of_a_known_allocation():
    def allocate() -> None:
        torch.ones(2**24).sum()  # 64 MiB

    timing = measure.time_it(allocate, 0.01)
    assert timing.repeats >= 3
    assert 0 < timing.p20 <= timing.p50 <= timing.p80
    memory = measure.peak_mib(allocate)
    assert memory is None or 32 <= memory <= 256


def test_a_backend_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(scan, "self_test", lambda backend: SelfTest(1e-3, False))
    with pytest.raises(CommandError, match="fails its self-test"):
        next(scan.run(["torch"], [cases.Case("x", (1, 2, 3), 2, 1, "raster2")], 0.01))


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "scan.csv"
    arguments = ["bench", "scan", "--case", "odd", "--backend", "torch", "reference", "--seconds", "0.01"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [(row["backend"], row["pass"]) for row in rows] == [
        ("torch", "forward"),
        ("torch", "training"),
        ("reference", "forward"),
        ("reference", "training"),
    ]
    assert all(float(row["p50_ms"]) > 0 and row["torch"] for row in rows)
    assert "odd 9x13x11" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cuda"], "no backend 'cuda'; known: native, torch, triton, reference"),
        (["--case", "nothing"], "no case contains 'nothing'; known: vmunet 32x32x32"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--out", "/nowhere/x.csv"], "is not a folder"),
    ],
    ids=["backend", "case", "threads", "out"],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["bench", "scan", *arguments]) == 2
    assert message in capsys.readouterr().err
