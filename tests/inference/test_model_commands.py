"""``medmamba export`` and ``medmamba info MODEL``."""

from __future__ import annotations

import pytest

from medmamba import cli
from medmamba.inference.model import load_model


def test_export_writes_a_package_and_says_what_to_do_next(trained, tmp_path, capsys):
    out = tmp_path / "model"
    options = ["--fold", "1", "--licence", "CC0-1.0", "--intended-use", "Tests.", "--half"]
    assert cli.main(["export", str(trained.folder), "-o", str(out), *options]) == 0
    model = load_model(out)
    printed = capsys.readouterr().out
    assert model.id in printed
    assert "fill in" in printed
    assert "MODEL_CARD.md" in printed
    assert (model.folds, model.description.licence, model.description.precision) == (("1",), "CC0-1.0", "float16")


def test_a_card_is_sealed_on_the_command_line(copied, capsys):
    with (copied / "MODEL_CARD.md").open("a") as stream:
        stream.write("More.\n")
    assert cli.main(["info", str(copied)]) == 2
    assert "medmamba info: MM-MD-006:" in capsys.readouterr().err
    assert cli.main(["export", str(copied), "--seal"]) == 0
    assert load_model(copied).id in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--seal", "-o", "model"]])
def test_export_wants_a_place_or_a_seal(options, trained, capsys):
    assert cli.main(["export", str(trained.folder), *options]) == 2
    assert "give either -o MODEL" in capsys.readouterr().err


def test_a_refusal_is_one_line_with_its_id(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), "-o", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("medmamba export: MM-MD-030: ")
    assert error.count("\n") == 1


def test_info_says_what_a_package_is(package, capsys):
    assert cli.main(["info", str(package)]) == 0
    printed = capsys.readouterr().out
    model = load_model(package)
    for line in (
        f"id: {model.id}",
        f"network: PlainConvUNet, {model.parameters / 1e6:.3f} M parameters, stored as float32, 3 outputs",
        "folds: 0 (1000 epochs), 1 (1000 epochs), checkpoint_final.pth of nnUNetTrainer, ",
        "input: MRI (ZScoreNormalization)",
        "spacing: 1x1x1 mm, patch 8x8x8, configuration 3d_fullres",
        "labels: 0 background, 1 Anterior, 2 Posterior",
        "training images: 2 cases, spacing 1x1x0.5 to 2x1x1 mm, shape 30x40x20 to 40x50x40",
        "metrics: fold 0, 1 cases, Dice 0.7500",
        "licence of the weights: CC-BY-4.0",
        "intended use: Tests of medmamba. Research use only, not a medical device.",
    ):
        assert line in printed


def test_foreign_texts_cannot_steer_the_terminal(copied, change_model, capsys):
    change_model(copied, lambda content: content.update(licence="\x1b[2Jfree\u202e"))
    assert cli.main(["info", str(copied)]) == 0
    printed = capsys.readouterr().out
    assert "licence of the weights: \\x1b[2Jfree\\u202e\n" in printed
    assert "\x1b" not in printed


def test_info_refuses_options_for_a_package_and_places_without_one(package, tmp_path, capsys):
    assert cli.main(["info", str(package), "--measure"]) == 2
    assert "takes no --measure" in capsys.readouterr().err
    assert cli.main(["info", str(tmp_path / "nowhere")]) == 2
    assert "MM-MD-001" in capsys.readouterr().err


def test_a_folder_with_the_name_of_a_network_does_not_hide_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "mednext").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", "mednext", "--plans", "missing.json"]) == 2
    assert "missing.json is missing" in capsys.readouterr().err
