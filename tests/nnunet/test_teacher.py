"""A student of ours learns from trained folders, stock ones too, and the checkpoint of a teacher is what plans name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medmamba.nnunet.resume import ResumeError
from medmamba.nnunet.task import Task
from medmamba.nnunet.teacher import TeacherError, check_teacher, choose_teacher, load_teacher
from medmamba.training.checkpoints import BEST, FINAL
from medmamba.training.settings import TEACHER
from medmamba.weights import read_training

DATASET = "Dataset901_Isotropic"
TRAINER = "nnUNetTrainerVMUNet"
CPU = torch.device("cpu")
SCHEDULE = {"num_epochs": 2, "num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 1}
REGIONS = {"background": 0, "hippocampus": [1, 2], "posterior": 2}
CLOCK = {"epoch_start_timestamps", "epoch_end_timestamps"}


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    monkeypatch.setenv("MEDMAMBA_SEED", "5")
    monkeypatch.setenv("MEDMAMBA_REHEARSAL", "0")
    monkeypatch.delenv(TEACHER, raising=False)
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png", lambda *_: None)


@pytest.fixture
def dataset_json(raw_cases):
    return json.loads((raw_cases / "dataset.json").read_text())


@pytest.fixture
def small_stock(stock_plans):
    """Stock plans with nnU-Net's own network, made narrow."""
    arguments = stock_plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [4] * len(arguments["strides"])
    return stock_plans


@pytest.fixture
def make_teacher(folders, dataset_json):
    """Writes a trained folder of initial weights, of nnU-Net's trainer on its own network or on ours."""

    def make(plans, name="Teacher", folds=("0",), checkpoint=FINAL, changes=None) -> Path:
        content = dataset_json | (changes or {})
        run = folders / "nnUNet_results" / DATASET / f"nnUNetTrainer__{name}__3d_fullres"
        for number, fold in enumerate(folds):
            torch.manual_seed(number)
            trainer = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", 0, content, CPU)
            trainer.initialize()
            (run / f"fold_{fold}").mkdir(parents=True)
            trainer.save_checkpoint(str(run / f"fold_{fold}" / checkpoint))
        (run / "plans.json").write_text(json.dumps(plans))
        (run / "dataset.json").write_text(json.dumps(content))
        return run

    return make


@pytest.fixture
def student(tiny_plans):
    """Plans of a student that :func:`taught_by` gives a teacher."""
    tiny_plans["medmamba"]["schedule"] = dict(SCHEDULE)
    return tiny_plans


def taught_by(plans, folder, **values):
    distillation = choose_teacher(folder, **values).distillation
    return {**plans, "medmamba": {**plans["medmamba"], "distillation": distillation.to_dict()}}


def task(plans, dataset_json) -> Task:
    return Task.of(plans, "3d_fullres", dataset_json)


def load(plans, dataset_json):
    from medmamba.nnunet.distillation import Distillation

    return load_teacher(Distillation.from_plans(plans), task(plans, dataset_json), CPU)


# Finding it


def test_a_trained_folder_is_named_from_nnunets_results_on_with_its_checksums(make_teacher, tiny_plans):
    run = make_teacher(tiny_plans, folds=("0", "1"))
    distillation = choose_teacher(run).distillation
    assert distillation.teacher == f"{DATASET}/{run.name}"
    sums = {fold: hashlib.sha256((run / f"fold_{fold}" / FINAL).read_bytes()).hexdigest() for fold in ("0", "1")}
    assert distillation.sha256 == sums
    assert choose_teacher(run / "fold_1").distillation.sha256 == {"1": sums["1"]}


def test_a_trained_folder_elsewhere_is_named_as_it_is(make_teacher, tiny_plans, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(make_teacher(tiny_plans), elsewhere)
    assert choose_teacher(elsewhere).distillation.teacher == str(elsewhere)


def test_the_best_checkpoint_teaches_where_no_fold_is_finished(make_teacher, tiny_plans):
    run = make_teacher(tiny_plans, checkpoint=BEST)
    assert choose_teacher(run).distillation.checkpoint == BEST
    (run / "fold_0" / BEST).unlink()
    with pytest.raises(TeacherError, match=f"has no {FINAL} and no {BEST} to teach with"):
        choose_teacher(run)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(TeacherError, match="is no trained folder of nnU-Net"):
        choose_teacher(tmp_path)


def test_a_checkpoint_that_wants_to_run_code_is_refused(make_teacher, tiny_plans):
    run = make_teacher(tiny_plans)
    content = torch.load(run / "fold_0" / FINAL, weights_only=False)
    torch.save({**content, "logging": os.system}, run / "fold_0" / FINAL)
    with pytest.raises(TeacherError, match="reading it would run code"):
        choose_teacher(run)


# Whether it fits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plans: plans["configurations"]["3d_fullres"].update(spacing=[1, 1, 2]), r"spacing \[1"),
        (
            lambda plans: plans["configurations"]["3d_fullres"].update(normalization_schemes=["NoNormalization"]),
            "normal",
        ),
        (lambda plans: plans["configurations"]["3d_fullres"].update(use_mask_for_norm=[True]), "masks in normal"),
        (lambda plans: plans.update(transpose_forward=[1, 0, 2]), r"transpose \[0, 1, 2\], the student \[1, 0, 2\]"),
    ],
    ids=["spacing", "normalisation", "masks", "transpose"],
)
def test_other_preprocessing_is_refused(change, message, make_teacher, tiny_plans, dataset_json):
    (fold,) = choose_teacher(make_teacher(tiny_plans)).folds
    plans = deepcopy(tiny_plans)
    change(plans)
    with pytest.raises(TeacherError, match=f"the teacher X has {message}.*the same preprocessed data"):
        check_teacher(fold, task(plans, dataset_json), "X")


def test_other_intensities_matter_for_ct_alone(make_teacher, tiny_plans, dataset_json):
    for scheme, is_refused in (("ZScoreNormalization", False), ("CTNormalization", True)):
        tiny_plans["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme]
        (fold,) = choose_teacher(make_teacher(tiny_plans, scheme)).folds
        plans = deepcopy(tiny_plans)
        plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1
        if is_refused:
            with pytest.raises(TeacherError, match="has intensities"):
                check_teacher(fold, task(plans, dataset_json), "X")
        else:
            check_teacher(fold, task(plans, dataset_json), "X")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "Anterior": 2, "Posterior": 1}}, "labels"),
        ({"labels": REGIONS, "regions_class_order": [1, 2]}, "labels"),
        ({"channel_names": {"0": "CT"}}, r"channels \[\"MRI\"\]"),
        ({"channel_names": {"0": "MRI", "1": "MRI"}}, "input channels 1, the student 2"),
    ],
    ids=["swapped", "regions", "channel", "channels"],
)
def test_other_labels_and_channels_are_refused(changes, message, make_teacher, tiny_plans, dataset_json):
    (fold,) = choose_teacher(make_teacher(tiny_plans)).folds
    with pytest.raises(TeacherError, match=message):
        check_teacher(fold, task(tiny_plans, dataset_json | changes), "X")


def test_a_teacher_may_know_no_ignore_label(make_teacher, tiny_plans, dataset_json):
    (fold,) = choose_teacher(make_teacher(tiny_plans)).folds
    check_teacher(fold, task(tiny_plans, {**dataset_json, "labels": {**dataset_json["labels"], "ignore": 3}}), "X")


def test_a_patch_that_its_strides_do_not_divide_is_refused(make_teacher, tiny_plans, dataset_json):
    (fold,) = choose_teacher(make_teacher(tiny_plans)).folds
    tiny_plans["configurations"]["3d_fullres"]["patch_size"] = [16, 20, 16]
    with pytest.raises(
        TeacherError, match=r"cannot read the patches of the student: .* axis 1 must be a multiple of 8"
    ):
        check_teacher(fold, task(tiny_plans, dataset_json), "X")


def test_a_trainer_that_may_build_another_network_is_refused(make_teacher, tiny_plans, dataset_json):
    run = make_teacher(tiny_plans)
    content = torch.load(run / "fold_0" / FINAL, weights_only=False)
    torch.save({**content, "trainer_name": "nnUNetTrainerBN"}, run / "fold_0" / FINAL)
    (fold,) = choose_teacher(run).folds
    with pytest.raises(TeacherError, match="was trained by nnUNetTrainerBN, which may build another network"):
        check_teacher(fold, task(tiny_plans, dataset_json), "X")


# What it says


def test_a_teacher_answers_as_its_network_with_the_heads_that_were_trained(
    make_teacher, student, small_stock, dataset_json
):
    for plans in (small_stock, student):
        run = make_teacher(plans, f"{plans['plans_name']}Teacher")
        reference = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", 0, dataset_json, CPU)
        reference.initialize()
        reference.network.load_state_dict(read_training(run / "fold_0" / FINAL)["network_weights"])
        data = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        state = torch.random.get_rng_state()
        (answer,) = load(taught_by(student, run), dataset_json).answers(data)
        assert torch.equal(torch.random.get_rng_state(), state)
        with torch.no_grad():
            expected = reference.network.eval()(data)
        assert len(answer) == len(expected) - 1  # nnU-Net does not train the coarsest
        assert all(torch.equal(one, other) for one, other in zip(answer, expected, strict=False))
        assert not any(one.requires_grad for one in answer)


def test_a_teacher_without_deep_supervision_is_asked_at_full_resolution_alone(make_teacher, student, dataset_json):
    run = make_teacher(student)
    content = torch.load(run / "fold_0" / FINAL, weights_only=False)
    torch.save({**content, "trainer_name": "nnUNetTrainerNoDeepSupervision"}, run / "fold_0" / FINAL)
    (answer,) = load(taught_by(student, run), dataset_json).answers(torch.zeros(1, 1, 16, 16, 16))
    assert [tuple(one.shape[2:]) for one in answer] == [(16, 16, 16)]


def test_weights_of_another_network_are_refused(make_teacher, student, dataset_json):
    run = make_teacher(student)
    content = torch.load(run / "fold_0" / FINAL, weights_only=False)
    del content["network_weights"]["decoder.seg_layers.0.weight"]
    torch.save(content, run / "fold_0" / FINAL)
    with pytest.raises(TeacherError, match=r"1 missing, e\.g\. 'decoder\.seg_layers\.0\.weight'"):
        load(taught_by(student, run), dataset_json)


def test_a_network_that_nobody_knows_is_not_imported(make_teacher, student, dataset_json):
    run = make_teacher(student)
    content = torch.load(run / "fold_0" / FINAL, weights_only=False)
    plans = content["init_args"]["plans"]
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "os.system"
    torch.save(content, run / "fold_0" / FINAL)
    with pytest.raises(TeacherError, match=r"'os\.system', which is no network"):
        load(taught_by(student, run), dataset_json)


# A training


def test_a_teacher_that_moved_is_found_where_the_variable_says(
    make_teacher, student, dataset_json, tmp_path, monkeypatch
):
    run = make_teacher(student)
    plans = taught_by(student, run)
    moved = tmp_path / "moved"
    run.rename(moved)
    with pytest.raises(TeacherError, match=r"is not there .* `medmamba train --teacher FOLDER` or MEDMAMBA_TEACHER"):
        load(plans, dataset_json)
    for place in (moved, moved / "fold_0"):
        monkeypatch.setenv(TEACHER, str(place))
        assert len(load(plans, dataset_json).networks) == 1


def test_another_checkpoint_in_its_place_is_refused(make_teacher, student, dataset_json, monkeypatch):
    plans = taught_by(student, make_teacher(student))
    monkeypatch.setenv(TEACHER, str(make_teacher(student, "Other", folds=("all", "0"))))
    with pytest.raises(TeacherError, match="another checkpoint than the one that the plans name"):
        load(plans, dataset_json)


@pytest.fixture
def train(make_trainer):
    """Trains as the console command does; ``asked`` to stop after that many iterations."""

    def start(plans, asked=None):
        trainer = make_trainer(TRAINER, plans)
        step, count = trainer.train_step, 0

        def counted(batch):
            nonlocal count
            if count == asked:
                os.kill(os.getpid(), signal.SIGTERM)
            count += 1
            return step(batch)

        trainer.train_step = counted
        if asked is None:
            trainer.run_training()
        else:
            with pytest.raises(SystemExit):
                trainer.run_training()
        return trainer

    return start


def weights(trainer) -> dict[str, torch.Tensor]:
    return read_training(trainer.folder / FINAL)["network_weights"]


def are_equal(one, other) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_student_trains_stops_and_goes_on_to_the_same_bits(train, make_teacher, student, small_stock, tmp_path):
    plans = taught_by(student, make_teacher(small_stock, folds=("0", "1")), weight=0.7)
    whole = train(plans)
    events = EventAccumulator(str(whole.folder / "tensorboard")).Reload()
    parts = [events.Scalars(f"loss/train_{name}") for name in ("segmentation", "distillation")]
    for total, host, distilled in zip(events.Scalars("loss/train"), *parts, strict=True):
        assert total.value == pytest.approx(0.3 * host.value + 0.7 * distilled.value, rel=1e-4)
        assert distilled.value > 0
    kept = tmp_path / "kept"
    whole.folder.rename(kept)
    whole.folder.mkdir()
    assert not are_equal(weights(train(student)), read_training(kept / FINAL)["network_weights"])
    shutil.rmtree(whole.folder)
    whole.folder.mkdir()
    train(plans, asked=4)
    again = train(plans)
    expected = read_training(kept / FINAL)
    found = read_training(again.folder / FINAL)
    assert are_equal(found["network_weights"], expected["network_weights"])
    assert all(found["logging"][key] == expected["logging"][key] for key in found["logging"].keys() - CLOCK)
    assert found["medmamba"]["distillation"] == plans["medmamba"]["distillation"]
    assert found["network_weights"].keys() == weights(again).keys() == again.bare_network.state_dict().keys()


KINDS = {
    "labels and ignore": {"labels": {"background": 0, "Anterior": 1, "Posterior": 2, "ignore": 3}},
    "regions": {"labels": REGIONS, "regions_class_order": [1, 2]},
    "regions and ignore": {"labels": {**REGIONS, "ignore": 3}, "regions_class_order": [1, 2]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_tells_the_loss_about_regions_and_the_ignore_label(
    kind, make_trainer, make_teacher, student, dataset_json, monkeypatch
):
    run = make_teacher(student, changes=KINDS[kind])
    trainer = make_trainer(TRAINER, taught_by(student, run), dataset_json=dataset_json | KINDS[kind])
    trainer.initialize()
    trainer.teacher = load_teacher(trainer.distillation, task(student, dataset_json | KINDS[kind]), CPU)
    has_ignored = "ignore" in kind
    channels = (2 + has_ignored) if "regions" in kind else 1
    targets = [torch.zeros(2, channels, size, size, size) for size in (16, 8, 4)]
    if has_ignored:
        for target in targets:
            target[:, -1:, target.shape[2] // 2 :] = 1 if "regions" in kind else 3
    data = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    answers, found = trainer.teacher.answers(data), []
    monkeypatch.setattr(trainer.teacher, "answers", lambda _: answers)
    trainer.network.eval()
    for shift in (0.0, 5.0):
        answers[0][0][:, 0, 8:] += shift
        with torch.no_grad(), trainer._taught({"data": data}) as taught:
            trainer.loss(trainer.network(taught["data"]), targets)
        found.append(trainer.loss_parts["distillation"])
    assert (found[0] == found[1]) == has_ignored


def test_a_teacher_with_fewer_stages_teaches_every_head(make_trainer, make_teacher, student, small_stock):
    teacher = deepcopy(small_stock)
    arguments = teacher["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["n_stages"] = 3
    for name in ("features_per_stage", "strides", "kernel_sizes", "n_conv_per_stage"):
        arguments[name] = arguments[name][:3]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][:2]
    trainer = make_trainer(TRAINER, taught_by(student, make_teacher(teacher)))
    trainer.on_train_start()
    data = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    (answer,) = trainer.teacher.answers(data)
    assert [tuple(one.shape[2:]) for one in answer] == [(16, 16, 16)]
    targets = [torch.zeros(2, 1, size, size, size) for size in (16, 8, 4)]
    trainer.train_step({"data": data, "target": targets, "keys": ["one", "two"]})
    assert trainer.loss_parts["distillation"] > 0


def test_weight_0_trains_as_without_a_teacher(train, make_teacher, student):
    own = train(student)
    alone = weights(own)
    shutil.rmtree(own.folder)
    own.folder.mkdir()
    assert are_equal(weights(train(taught_by(student, make_teacher(student), weight=0.0))), alone)


def test_a_training_is_not_continued_with_another_teacher(train, make_teacher, student):
    train(taught_by(student, make_teacher(student, folds=("0", "1")) / "fold_0"), asked=4)
    run = make_teacher(student, "Other", folds=("1", "0"))
    with pytest.raises(ResumeError, match=r"plans\.medmamba\.distillation\.teacher .* -> "):
        train(taught_by(student, run / "fold_0"))


def test_a_teacher_that_does_not_fit_stops_before_the_data_are_read(train, make_teacher, make_trainer, student):
    plans = taught_by(student, make_teacher(student))
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    trainer = make_trainer(TRAINER, plans)
    with pytest.raises(TeacherError, match="spacing"):
        trainer.run_training()
    assert trainer.dataloader_train is None


def test_a_rehearsal_with_a_teacher_leaves_no_trace(train, make_teacher, student, monkeypatch, capsys):
    plans = taught_by(student, make_teacher(student))
    whole = train(plans)
    expected = weights(whole)
    shutil.rmtree(whole.folder)
    whole.folder.mkdir()
    monkeypatch.setenv("MEDMAMBA_REHEARSAL", "1")
    assert are_equal(weights(train(plans)), expected)
    assert "checkpoint, training, validation, export and evaluation work" in capsys.readouterr().out
