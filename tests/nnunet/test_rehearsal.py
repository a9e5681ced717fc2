"""The rehearsal before epoch 0 finds what would end a training at its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from medmamba.nnunet.rehearsal import RehearsalError


@pytest.fixture
def trainer(make_trainer, tiny_plans, monkeypatch):
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png", lambda *_: None)
    return make_trainer("nnUNetTrainerVMUNet", tiny_plans)


def without_reference(trainer, monkeypatch):
    shutil.rmtree(Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations")


def with_small_disk(trainer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def with_disk_that_changes_what_is_written(trainer, monkeypatch):
    real = torch.save

    def save(content, path):
        weights = {name: value + 1 for name, value in content["network_weights"].items()}
        real({**content, "network_weights": weights}, path)

    monkeypatch.setattr(torch, "save", save)


def with_wrong_ending(trainer, monkeypatch):
    trainer.dataset_json["file_ending"] = ".unknown"


def with_loss_that_breaks(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "train_step", lambda batch: 1 / 0)


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (without_reference, Exception, "gt_segmentations"),
        (with_small_disk, RehearsalError, r"has 0\.00 GiB left.*make room"),
        (with_disk_that_changes_what_is_written, RehearsalError, "does not hold what was written"),
        (with_wrong_ending, Exception, "unknown"),
        (with_loss_that_breaks, ZeroDivisionError, "division by zero"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_would_break_later_breaks_now(trainer, monkeypatch, spoil, error, text):
    spoil(trainer, monkeypatch)
    with pytest.raises(error, match=text):
        trainer.run_training()
    assert trainer.current_epoch == 0
    assert not list(trainer.folder.glob("checkpoint_*"))
    assert not list(trainer.folder.glob("*rehearsal*"))


@pytest.mark.parametrize("value", ["0", "false", "no"])
def test_it_can_be_left_out(make_trainer, tiny_plans, monkeypatch, capsys, value):
    monkeypatch.setenv("MEDMAMBA_REHEARSAL", value)
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png", lambda *_: None)
    make_trainer("nnUNetTrainerVMUNet", tiny_plans).run_training()
    assert "Rehearsal" not in capsys.readouterr().out


def test_a_continued_training_has_none(make_trainer, tiny_plans, trainer, capsys):
    trainer.run_training()
    tiny_plans["medmamba"]["schedule"]["num_epochs"] = 2
    again = make_trainer("nnUNetTrainerVMUNet", tiny_plans)
    again._is_told_to_continue = True
    again.run_training()
    assert again.current_epoch == 2
    assert capsys.readouterr().out.count("Rehearsal") == 1


def test_regions_are_rehearsed(make_trainer, tiny_plans, raw_cases, capsys):
    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    dataset_json |= {"labels": {"background": 0, "whole": [1, 2], "Posterior": 2}}
    dataset_json["regions_class_order"] = [1, 2]
    make_trainer("nnUNetTrainerVMUNet", tiny_plans, dataset_json=dataset_json).run_training()
    assert "evaluation work" in capsys.readouterr().out
