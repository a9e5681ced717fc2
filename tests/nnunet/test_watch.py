"""What a training shows: event files with everything a person watches, and the same after a restart."""

from __future__ import annotations

import json
import os
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medmamba.training.progress import read_progress

SCALARS = {
    *("loss/train", "loss/validation", "lr", "dice/mean", "dice/ema", "dice/Anterior", "dice/Posterior"),
    *("time/epoch_s", "time/data_wait_s", "time/data_wait_share", "time/iteration_s", "memory/cpu_peak_gib"),
    *("gradient_norm/mean", "gradient_norm/max"),
}
SCAN = {"dt_mean", "dt_min", "dt_max", "memory_tokens_p10", "memory_tokens_p50", "memory_tokens_p90"}
SCAN |= {"eigenvalue_min", "eigenvalue_max", "eigenvalue_negative"}


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    monkeypatch.setenv("MEDMAMBA_REHEARSAL", "0")
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png", lambda *_: None)


@pytest.fixture
def plans(tiny_plans):
    tiny_plans["medmamba"]["schedule"] = {
        "num_epochs": 3,
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
    }
    return tiny_plans


def events(trainer) -> EventAccumulator:
    return EventAccumulator(str(trainer.folder / "tensorboard"), {"images": 0, "scalars": 0, "tensors": 0}).Reload()


def test_event_files_hold_what_a_person_watches(make_trainer, plans):
    trainer = make_trainer("nnUNetTrainerVMUNet", plans)
    trainer.run_training()
    found = events(trainer)
    scalars = set(found.Tags()["scalars"])
    assert scalars >= SCALARS
    assert all([event.step for event in found.Scalars(tag)] == [0, 1, 2] for tag in SCALARS - {"dice/ema"})
    stages = {tag.split("/")[1] for tag in scalars if tag.startswith("scan/")}
    assert {f"scan/{stage}/{name}" for stage in stages for name in SCAN} <= scalars
    assert any(stage.startswith("encoder.stage_") for stage in stages)
    (overlay,) = found.Tags()["images"]
    assert overlay.startswith("overlay/hippocampus_")
    assert [event.step for event in found.Images(overlay)] == [0, 2]
    logged = trainer.logger.get_value("train_losses", step=None)
    assert [event.value for event in found.Scalars("loss/train")] == pytest.approx([float(v) for v in logged])


def test_a_training_that_was_stopped_shows_one_curve(make_trainer, plans, monkeypatch):
    first = make_trainer("nnUNetTrainerVMUNet", plans)
    step = first.validation_step

    def asked(batch):
        if first.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    first.validation_step = asked
    with pytest.raises(SystemExit):
        first.run_training()
    note = read_progress(first.folder)
    # Asked in the last validation batch of epoch 1: its end is too near to be given up.
    assert (note.state, note.epoch, note.iteration) == ("stopped", 2, 0)
    assert note.epochs == 3
    second = make_trainer("nnUNetTrainerVMUNet", plans)
    second.run_training()
    assert [event.step for event in events(second).Scalars("loss/train")] == [0, 1, 2]
    note = read_progress(second.folder)
    assert (note.state, note.epoch, note.seed) == ("finished", 3, second.seed)
    assert note.best_dice == pytest.approx(second._best_ema)


def test_the_digest_of_the_plans_tells_runs_apart(make_trainer, plans, tmp_path):
    from medmamba.nnunet.watch import hparams_of

    one = hparams_of(make_trainer("nnUNetTrainerVMUNet", plans))
    again = hparams_of(make_trainer("nnUNetTrainerVMUNet", json.loads(json.dumps(plans))))
    plans["configurations"]["3d_fullres"]["batch_size"] = 3
    other = hparams_of(make_trainer("nnUNetTrainerVMUNet", plans))
    assert one["plans_digest"] == again["plans_digest"] != other["plans_digest"]


@pytest.mark.parametrize("labels", [{"background": 0, "Posterior": 2, "Anterior": 1}, None])
def test_classes_have_their_names(make_trainer, plans, raw_cases, labels):
    from medmamba.nnunet.watch import class_names

    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    if labels is None:
        dataset_json |= {"labels": {"background": 0, "whole": [1, 2], "Posterior": 2}, "regions_class_order": [1, 2]}
    else:
        dataset_json["labels"] = labels
    trainer = make_trainer("nnUNetTrainerVMUNet", plans, dataset_json=dataset_json)
    assert class_names(trainer) == (["whole", "Posterior"] if labels is None else ["Anterior", "Posterior"])


def test_regions_are_shown_as_labels(make_trainer, plans, raw_cases):
    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    dataset_json |= {"labels": {"background": 0, "whole": [1, 2], "Posterior": 2}, "regions_class_order": [1, 2]}
    plans["medmamba"]["schedule"]["num_epochs"] = 1
    trainer = make_trainer("nnUNetTrainerVMUNet", plans, dataset_json=dataset_json)
    trainer.run_training()
    assert any(tag.startswith("overlay/") for tag in events(trainer).Tags()["images"])
