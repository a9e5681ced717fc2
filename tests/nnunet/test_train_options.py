"""``medmamba train``: options of ours become variables, the others reach nnU-Net as they are."""

from __future__ import annotations

import os

import pytest

from medmamba import cli
from medmamba.command import CommandError
from medmamba.nnunet.train_options import take
from medmamba.training.settings import REHEARSAL, RESTART, SAVE_MINUTES, SEED, TEACHER

NNUNET = ["4", "3d_fullres", "0", "-p", "plans", "--npz"]


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name in (REHEARSAL, RESTART, SAVE_MINUTES, SEED, TEACHER):
        monkeypatch.setenv(name, "before")  # so that it is put back afterwards
        monkeypatch.delenv(name)


def test_without_options_nothing_is_set():
    assert take(NNUNET) == NNUNET
    assert not {REHEARSAL, RESTART, SAVE_MINUTES, SEED, TEACHER} & os.environ.keys()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--restart"], {RESTART: "1"}),
        (["--seed", "7"], {SEED: "7"}),
        (["--save-minutes", "2.5"], {SAVE_MINUTES: "2.5"}),
        (["--teacher", "."], {TEACHER: "."}),
        (["--no-rehearsal", "--seed=0"], {REHEARSAL: "0", SEED: "0"}),
    ],
)
@pytest.mark.parametrize("at", [0, 3, 6])
def test_options_anywhere_become_variables(options, expected, at):
    assert take([*NNUNET[:at], *options, *NNUNET[at:]]) == NNUNET
    assert {name: os.environ[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "seed"),
        (["--seed", "x"], "'x' is no whole number"),
        (["--save-minutes", "nan"], "'nan' is no number of minutes"),
        (["--teacher", "nowhere"], "--teacher nowhere is not a folder"),
        (["--restart", "--c"], "leave one of them out"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(CommandError, match=message):
        take([*NNUNET, *options])


def test_help_names_ours_beside_nnunets(capsys):
    cli.main(["train", "-h"])
    printed = capsys.readouterr().out
    assert "--restart" in printed
    assert "-pretrained_weights" in printed
