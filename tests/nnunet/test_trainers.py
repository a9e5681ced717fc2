"""Our trainers on a small real dataset, on the CPU."""

from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba.layers import VSSBlock
from medmamba.mixers import CONTROLS, CORES
from medmamba.mixers.block import MixerBlock
from medmamba.networks import NETWORKS
from medmamba.nnunet.architecture import ArchitectureError, network_of
from medmamba.nnunet.guard import NonFiniteLossError
from medmamba.nnunet.names import TRAINER_VARIANTS, trainer_name
from medmamba.nnunet.schedule import ScheduleError
from medmamba.nnunet.trainers import TRAINERS
from medmamba.presets import MIXERS


@pytest.fixture
def trainer(make_trainer, tiny_plans):
    return make_trainer("nnUNetTrainerVMUNet", tiny_plans)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 1, 16, 16, 16), generator=generator).float()
    targets = [target[:, :, ::step, ::step, ::step] for step in (1, 2, 4)]
    image = torch.randn(2, 1, 16, 16, 16, generator=generator)
    return {"data": image, "target": targets, "keys": ["case_a", "case_b"]}


def test_names_and_classes_agree():
    assert {name: trainer.variant for name, trainer in TRAINERS.items()} == TRAINER_VARIANTS
    assert len(set(TRAINER_VARIANTS.values())) == len(TRAINER_VARIANTS)
    for name, trainer in TRAINERS.items():
        assert name == trainer.__name__
        assert name.startswith(trainer_name(trainer.variant.network))
        assert "__" not in name


def test_every_network_and_every_control_has_a_trainer():
    modes = {(variant.network, variant.ssm_mode) for variant in TRAINER_VARIANTS.values()}
    controls = [None, *CONTROLS]
    assert modes == {(n, mode) for n, spec in NETWORKS.items() for mode in (controls if spec.has_scans else [None])}
    mixers = {(variant.network, variant.mixer) for variant in TRAINER_VARIANTS.values()}
    every = [None, *MIXERS]
    assert mixers == {(n, mixer) for n, spec in NETWORKS.items() for mixer in (every if spec.has_scans else [None])}


@pytest.mark.parametrize("plans", ["stock_plans", "tiny_plans"])
def test_a_control_in_the_name_replaces_the_scan(plans, make_trainer, request):
    modes = {}
    for name in ("nnUNetTrainerVMUNet", "nnUNetTrainerVMUNet_Identity"):
        trainer = make_trainer(name, request.getfixturevalue(plans))
        trainer.initialize()
        modes[name] = {type(module) for module in trainer.network.modules()}
    assert CORES["scan"] in modes["nnUNetTrainerVMUNet"] - modes["nnUNetTrainerVMUNet_Identity"]
    assert CORES["identity"] in modes["nnUNetTrainerVMUNet_Identity"]
    built = trainer.plans_manager.plans["configurations"]["3d_fullres"]["architecture"]
    assert built["arch_kwargs"]["ssm_mode"] == "identity"


@pytest.mark.parametrize("plans", ["stock_plans", "tiny_plans"])
def test_a_mixer_in_the_name_replaces_the_blocks_and_knows_the_spacing(plans, make_trainer, request):
    trainer = make_trainer("nnUNetTrainerVMUNet_GroupMamba3D_Identity", request.getfixturevalue(plans))
    trainer.initialize()
    kinds = {type(module) for module in trainer.network.modules()}
    assert MixerBlock in kinds
    assert CORES["identity"] in kinds
    assert not kinds & {VSSBlock, CORES["scan"]}
    written = trainer.plans_manager.plans["configurations"]["3d_fullres"]
    mixer = {"name": "groupmamba3d", "spacing": written["spacing"]}
    assert written["architecture"]["arch_kwargs"]["mixer"] == mixer
    again = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    again.load_state_dict(trainer.network.state_dict())


def test_a_finetuning_trainer_starts_slowly(make_trainer, tiny_plans):
    trainer = make_trainer("nnUNetTrainerVMUNet_Finetune_50epochs", tiny_plans)
    assert (trainer.num_epochs, trainer.initial_lr, trainer.schedule.warmup_epochs) == (50, pytest.approx(1e-3), 2)
    trainer.initialize()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


def test_the_plans_decide_the_schedule(make_trainer, tiny_plans):
    tiny_plans["medmamba"]["schedule"] = {"num_epochs": 7, "num_iterations_per_epoch": 11, "optimizer": "AdamW"}
    trainer = make_trainer("nnUNetTrainerVMUNet", tiny_plans)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.initial_lr) == (7, 11, 1e-3)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


def test_a_number_of_epochs_in_the_name_wins_over_the_plans(make_trainer, tiny_plans):
    trainer = make_trainer("nnUNetTrainerVMUNet_5epochs", tiny_plans)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (5, 2)


def test_a_bad_schedule_in_the_plans_stops_before_training(make_trainer, tiny_plans):
    tiny_plans["medmamba"]["schedule"]["num_epoch"] = 5
    with pytest.raises(ScheduleError, match="unknown schedule entry num_epoch"):
        make_trainer("nnUNetTrainerVMUNet", tiny_plans)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_stock_plans_get_our_network_and_stay_as_they_are(network, configuration, make_trainer, stock_plans):
    before = deepcopy(stock_plans)
    trainer = make_trainer(trainer_name(network), stock_plans, configuration)
    assert stock_plans == before
    derived = trainer.plans_manager.plans
    assert network_of(derived["configurations"][configuration]["architecture"]) == network
    assert derived["plans_name"] == before["plans_name"]
    assert trainer.configuration_manager.data_identifier == before["configurations"][configuration]["data_identifier"]


def test_a_cascade_gets_our_network_too(make_trainer, load_plans):
    trainer = make_trainer("nnUNetTrainerVMUNet", load_plans("cascade"), "3d_cascade_fullres")
    assert network_of(trainer.configuration_manager.configuration["architecture"]) == "vmunet"
    assert trainer.is_cascaded


def test_plans_for_another_network_are_refused(make_trainer, tiny_plans, monkeypatch):
    other = replace(NETWORKS["vmunet"], name="other", build="medmamba.networks.other.other")
    monkeypatch.setitem(NETWORKS, "other", other)
    tiny_plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "medmamba.networks.other.other"
    with pytest.raises(ArchitectureError, match="made for the network other, the trainer trains vmunet"):
        make_trainer("nnUNetTrainerVMUNet", tiny_plans)


def test_a_patch_that_does_not_fit_stops_before_training(make_trainer, tiny_plans):
    tiny_plans["configurations"]["3d_fullres"]["patch_size"] = [16, 20, 16]
    with pytest.raises(ArchitectureError, match="axis 1 must be a multiple of 8, not 20"):
        make_trainer("nnUNetTrainerVMUNet", tiny_plans)


def test_steps_lower_the_loss(trainer, batch):
    trainer.initialize()
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_plans_with_one_downsampling_have_a_loss(make_trainer, stock_plans, batch):
    planned = stock_plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    planned.update(strides=planned["strides"][:2], kernel_sizes=planned["kernel_sizes"][:2], features_per_stage=[8, 16])
    trainer = make_trainer("nnUNetTrainerVMUNet", stock_plans)
    trainer.initialize()
    assert np.isfinite(trainer.train_step({**batch, "target": batch["target"][0]})["loss"])


def test_a_bad_voxel_stops_with_the_cases(trainer, batch):
    trainer.initialize()
    trainer.train_step(batch)
    batch["data"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"a scan stopped.* at epoch 0, iteration 0 \(cases case_a, case_b\)"):
        trainer.train_step(batch)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_and_a_dump(factor, trainer, batch):
    trainer.initialize()
    trainer.train_step(batch)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.loss = lambda output, target: output[0].sum() * factor
    with pytest.raises(
        NonFiniteLossError, match=r"gradients are not finite at epoch 0, iteration 0 \(cases case_a, case_b"
    ):
        trainer.train_step(batch)
    (path,) = Path(trainer.output_folder).glob("not_finite_*.pth")
    kept = torch.load(path, weights_only=True)
    assert torch.equal(kept["data"], batch["data"])
    assert (kept["keys"], kept["epoch"], kept["iteration"]) == (["case_a", "case_b"], 0, 0)
    for weights in (trainer.network.state_dict(), kept["network_weights"]):
        assert all(torch.equal(weights[name], value) for name, value in before.items())


def test_a_gradient_that_overflows_stops_too(trainer, batch):
    trainer.initialize()
    trainer.loss = lambda output, target: (output[0].sum() * 0).sqrt()  # 0, with an infinite slope
    with pytest.raises(NonFiniteLossError, match="gradients are not finite"):
        trainer.train_step(batch)


def test_a_dump_that_cannot_be_written_does_not_hide_the_reason(trainer, batch):
    trainer.initialize()
    trainer.output_folder = "/dev/full/nowhere"
    trainer.loss = lambda output, target: output[0].sum() * float("nan")
    with pytest.raises(NonFiniteLossError, match=r"gradients are not finite.*could not be written.*Not a directory"):
        trainer.train_step(batch)


def test_a_dump_on_a_full_disk_does_not_hide_the_reason(trainer, batch, monkeypatch):
    def full(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    trainer.initialize()
    monkeypatch.setattr(torch, "save", full)
    trainer.loss = lambda output, target: output[0].sum() * float("nan")
    with pytest.raises(NonFiniteLossError, match=r"gradients are not finite.*could not be written.*No space left"):
        trainer.train_step(batch)


def test_the_cases_are_in_the_batches_of_nnunet(trainer):
    trainer.on_train_start()
    assert len(next(trainer.dataloader_train)["keys"]) == 2


def test_a_2d_configuration_trains_on_slices(make_trainer, tiny_plans):
    configurations = tiny_plans["configurations"]
    configurations["2d"]["data_identifier"] = configurations["3d_fullres"]["data_identifier"]
    trainer = make_trainer("nnUNetTrainerVMUNet", tiny_plans, "2d")
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    assert batch["data"].shape == (2, 1, 16, 16)
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_a_training_runs_saves_and_resumes(make_trainer, tiny_plans):
    tiny_plans["medmamba"]["schedule"].update(num_epochs=2, save_every=1)
    first = make_trainer("nnUNetTrainerVMUNet", tiny_plans)
    first.on_train_start()
    run_epoch(first)
    saved = f"{first.output_folder}/checkpoint_latest.pth"
    second = make_trainer("nnUNetTrainerVMUNet", tiny_plans)
    second.load_checkpoint(saved)
    assert second.current_epoch == first.current_epoch == 1
    for own, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(own, other)
    second.on_train_start()
    run_epoch(second)
    assert second.optimizer.param_groups[0]["lr"] < first.optimizer.param_groups[0]["lr"]


def run_epoch(trainer):
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()


def test_a_checkpoint_says_what_trained_it(trainer, tmp_path):
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    record = torch.load(tmp_path / "checkpoint.pth", weights_only=False)["medmamba"]
    assert (record["trainer"], record["network"]) == ("nnUNetTrainerVMUNet", "vmunet")
    assert record["schedule"] == trainer.schedule.to_dict()


def test_a_failing_save_leaves_the_old_checkpoint(trainer, tmp_path, monkeypatch):
    trainer.initialize()
    path = tmp_path / "checkpoint.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()
    monkeypatch.setattr(trainer, "_best_ema", lambda: None)  # a local function cannot be pickled
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["checkpoint.pth"]


def test_disabled_checkpointing_writes_nothing(trainer, tmp_path):
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert not (tmp_path / "checkpoint.pth").exists()


def test_pseudo_dice_is_a_number_per_structure(trainer, batch):
    trainer.initialize()
    with torch.no_grad():
        result = trainer.validation_step(batch)
    assert result["tp_hard"].shape == (2,)
    assert np.isfinite(result["loss"])


@pytest.mark.gpu
def test_bfloat16_is_used_where_the_gpu_has_it(tiny_plans, folders, raw_cases, batch):
    import json

    dataset_json = json.loads((raw_cases / "dataset.json").read_text())
    plans = {**tiny_plans, "continue_training": False}
    trainer = TRAINERS["nnUNetTrainerVMUNet"](plans, "3d_fullres", 0, dataset_json, torch.device("cuda"))
    if not trainer.has_bf16:
        pytest.skip("this GPU has no bfloat16")
    trainer.initialize()
    dtypes = set()
    hook = trainer.network.register_forward_hook(lambda module, inputs, output: dtypes.update(o.dtype for o in output))
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(8)]
    hook.remove()
    assert trainer.grad_scaler is None
    assert dtypes == {torch.bfloat16}
    assert losses[-1] < losses[0]
