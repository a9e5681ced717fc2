"""The bench of the mixers: a block of each computes the same volume, and what it counts is what the block does."""

from __future__ import annotations

import csv

import pytest
import torch

from medmamba import cli
from medmamba.bench import cores, mixers, volumes
from medmamba.diagnostics.operations import operations
from medmamba.presets import MIXERS

CPU = torch.device("cpu")
#: 60 tokens of 12 channels; pooled and in phases its axes are uneven.
TINY = volumes.VolumeCase(12, (3, 4, 5))


def block(name: str) -> mixers.Block:
    return mixers.Block(name, TINY.channels, depth=0)


def test_every_mixer_is_timed_beside_the_full_convolution():
    chosen, cases = mixers.select(None, None)
    assert chosen == sorted(MIXERS)
    assert [case.name for case in cases] == ["C 64 24x24x24", "C 128 12x12x12"]
    found = mixers.contenders(chosen)
    assert [c.name for c in found if c.kind == "mixer"] == chosen
    assert [(c.name, c.layout) for c in found if c.kind == "convolution"] == [
        (volumes.YARDSTICK, "NCDHW"),
        (volumes.YARDSTICK, "channels last"),
    ]


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_a_pass_gives_the_tokens_back_and_all_gradients(name):
    (contender,) = (c for c in mixers.contenders([name]) if c.kind == "mixer")
    module = contender.build(TINY)
    functions = volumes.passes(TINY, contender, module, CPU)
    assert functions["forward"]().shape == (1, 60, 12)
    assert len(functions["training"]()) == 1 + len(list(module.parameters()))


@pytest.mark.parametrize(
    ("name", "tokens", "elements"),
    [
        ("vim3d", 2 * 60, 2 * 60 * 24),
        ("vmamba3d", 6 * 60, 6 * 60 * 24),
        # A sixth of the channels per route: one scan over all of them.
        ("groupmamba3d", 6 * 60, 60 * 12),
        # One route of 60 tokens, five of 2 x 2 x 3.
        ("msvmamba3d", 60 + 5 * 12, (60 + 5 * 12) * 24),
        ("effvmamba3d", 60, 60 * 24),
        ("vfimamba3d", 6 * 2 * 60, 6 * 60 * 24),
        ("s4nd3d", 0, 0),
    ],
)
def test_scanned_tokens_are_counted_per_route_and_elements_per_channel(name, tokens, elements):
    assert mixers.scanned(block(name), TINY) == (tokens, elements)


@pytest.mark.parametrize(
    ("name", "per_token", "once"),
    [
        # A row of the Toeplitz matrix per axis; sines and cosines of 16 modes per axis, direction, channel and lag.
        ("global_conv", 12 * (6 + 6 + 6), 3 * 2 * 2 * 12 * 16 * 6),
        # Projection to 3 x 16 channels, their convolution of 27 taps, into the latents and out; three maps of latents.
        ("hsm_ssd", 12 * 48 + 48 * 27 + 2 * 12 * 16, 3 * 12 * 12 * 16),
        # To 2 x 16 channels and one head, the convolution, into the state and out of it.
        ("nc_ssd", 12 * 32 + 32 * 27 + 12 + 2 * 12 * 16, 0),
        # Two products of every token with every other, and three projections.
        ("attention", 2 * 12 * 216 + 3 * 12 * 12, 0),
    ],
)
def test_cores_without_a_scan_have_their_products_counted(name, per_token, once):
    case = volumes.VolumeCase(12, (6, 6, 6))
    whole = volumes.OnTokens(cores.core(name, case), case.grid)
    assert operations(whole, case.channels, case.grid).total == per_token * case.length + once


def test_the_command_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mixers, "CASES", (TINY,))
    out = tmp_path / "mixers.csv"
    assert cli.main(["bench", "mixers", "--mixer", "vim3d", "--seconds", "0.001", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["contender"] for row in rows] == [volumes.YARDSTICK] * 4 + ["vim3d"] * 2
    assert [row["scan_tokens"] for row in rows] == [""] * 4 + ["120"] * 2
    assert "time x of one conv 3x3x3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixers", "--mixer", "vim2d"], "no mixer 'vim2d'; known: convs5z, efficientvim3d"),
        (["mixers", "--case", "nothing"], "no case contains 'nothing'; known: C 64 24x24x24"),
        (["mixers", "--core", "scan"], "bench mixers takes no --core"),
        (["cores", "--mixer", "vim3d"], "bench cores takes no --mixer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
