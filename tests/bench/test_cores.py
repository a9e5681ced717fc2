"""The bench of the cores: everything computes the same volume, and ratios are to the faster full convolution."""

from __future__ import annotations

import csv

import pytest
import torch

from medmamba import cli
from medmamba.bench import cores, volumes
from medmamba.mixers import CORES

CPU = torch.device("cpu")
TINY = volumes.VolumeCase(6, (3, 4, 5))


def by_name(name: str, layout: str) -> volumes.Contender:
    (found,) = (c for c in cores.contenders(sorted(CORES)) if (c.name, c.layout) == (name, layout))
    return found


def test_every_core_and_every_convolution_is_timed_on_every_volume():
    chosen, cases = cores.select(None, None)
    assert chosen == sorted(CORES)
    assert [case.name for case in cases] == ["C 64 48x48x48", "C 128 24x24x24", "C 256 12x12x12"]
    found = cores.contenders(chosen)
    assert [c.name for c in found if c.kind == "core"] == chosen
    assert {c.layout for c in found if c.name == volumes.YARDSTICK} == {"NCDHW", "channels last"}


@pytest.mark.parametrize("contender", cores.contenders(["global_conv"]), ids=lambda c: f"{c.name} {c.layout}")
def test_a_pass_gives_a_volume_of_the_same_layout_and_all_gradients(contender):
    module = contender.build(TINY)
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    functions = volumes.passes(TINY, contender, module, CPU)
    y = functions["forward"]()
    tokens = y if contender.kind == "core" else y.flatten(2).mT
    assert tokens.shape == (1, 60, 6)
    is_last = seen[0].dim() == 5 and seen[0].is_contiguous(memory_format=torch.channels_last_3d)
    assert is_last == (contender.layout == "channels last")
    gradients = functions["training"]()
    assert len(gradients) == 1 + len(list(module.parameters()))
    assert gradients[0].shape == y.shape


def test_the_floor_and_the_operations_are_those_of_a_convolution():
    module = by_name(volumes.YARDSTICK, "NCDHW").build(TINY)
    row = volumes.describe(TINY, by_name(volumes.YARDSTICK, "NCDHW"), module, 1e9, CPU)
    assert row["parameters"] == 27 * 36 + 6
    # Voxels outside the volume are read as well: the padding is counted.
    assert row["mega_macs"] == pytest.approx(60 * 27 * 36 / 1e6, abs=1e-3)
    assert row["memory_floor_ms"] == pytest.approx((2 * 60 * 6 + 27 * 36 + 6) * 4 / 1e9 * 1e3)


def test_what_is_above_its_budget_is_a_row_without_numbers():
    large = volumes.VolumeCase(4, (17, 16, 16))
    rows = [row for row in cores.run(["attention"], [large], 0.001) if row["contender"] == "attention"]
    assert [row["note"] for row in rows] == ["not run: 4352 tokens are above its budget of 4096"] * 2
    assert {row["p50_ms"] for row in rows} == {row["mega_macs"] for row in rows} == {""}


def row(contender: str, layout: str, p50: float, cpu: float | str, threads: int = 1, device: str = "cpu") -> dict:
    facts = {"channels": 8, "pass": "forward", "note": "", "threads": threads, "device": device}
    return {**facts, "contender": contender, "layout": layout, "p50_ms": p50, "cpu_min_ms": cpu}


def test_ratios_are_to_the_faster_full_convolution():
    rows = [
        row(volumes.YARDSTICK, "NCDHW", 9, 4),
        row(volumes.YARDSTICK, "channels last", 9, 2),
        row("x", "tokens", 9, 6),
    ]
    rows.append({**row("y", "tokens", 0, 0), "note": "not run: why", "pass": "training"})
    assert volumes.ratios(rows) == {
        (volumes.YARDSTICK, "NCDHW"): {(8, "forward"): 2},
        (volumes.YARDSTICK, "channels last"): {(8, "forward"): 1},
        ("x", "tokens"): {(8, "forward"): 3},
    }
    *_, last = volumes.lines(rows)
    assert last.split() == ["x", "tokens", "3", "-"]


@pytest.mark.parametrize(("threads", "device"), [(2, "cpu"), (1, "cuda")])
def test_ratios_are_of_wall_time_where_processor_time_says_little(threads, device):
    both = [row(volumes.YARDSTICK, "NCDHW", 3, 1, threads, device), row("x", "tokens", 6, 1, threads, device)]
    assert volumes.ratios(both)["x", "tokens"] == {(8, "forward"): 2}


def test_the_command_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cores, "CASES", (TINY,))
    out = tmp_path / "cores.csv"
    arguments = ["bench", "cores", "--core", "identity", "scan", "--seconds", "0.001", "--out", str(out)]
    assert cli.main(arguments) == 0
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 2 * (6 + 2)
    assert all(float(row["p50_ms"]) > 0 and row["torch"] and row["gate"] for row in rows)
    assert "time x of one conv 3x3x3" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_cores_run_on_a_gpu(tmp_path):
    out = tmp_path / "cores.csv"
    assert cli.main(["bench", "cores", "--device", "cuda", "--seconds", "0.01", "--out", str(out)]) == 0
    assert {row["device"] for row in csv.DictReader(out.open())} == {"cuda"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cores", "--core", "mamba3"], "no core 'mamba3'; known: attention, dwconv"),
        (["cores", "--case", "nothing"], "no case contains 'nothing'; known: C 64 48x48x48"),
        (["cores", "--peers", "published"], "bench cores takes no --peers"),
        (["cores", "--no-peers"], "bench cores takes no --no-peers"),
        (["cores", "--from", "x.csv"], "bench cores takes no --from"),
        (["scan", "--core", "scan"], "bench scan takes no --core"),
        (["cores", "--threads", "0"], "--threads must be 1 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
