"""What we rely on in nnU-Net, one test per assumption: an upgrade that breaks one breaks a named test."""

from __future__ import annotations

import inspect
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distribution
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run import run_training
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from medmamba.nnunet.names import EXT_TRAINER, TRAINER_VARIANTS, TrainerVariant, trainers_folder
from medmamba.nnunet.optimisation import WarmupLR
from medmamba.nnunet.schedule import Schedule
from medmamba.nnunet.trainers import TRAINERS, MambaTrainer, autocast_default


def build(plans, configuration="3d_fullres", *, deep_supervision=True, trainer=nnUNetTrainer):
    manager = PlansManager(plans)
    return trainer.build_network_architecture(
        manager, manager.get_configuration(configuration), 1, 3, enable_deep_supervision=deep_supervision
    )


def test_a_network_is_built_from_its_import_path(tiny_plans):
    block = tiny_plans["configurations"]["3d_fullres"]["architecture"]
    network = get_network_from_plans(
        block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"], 1, 3, deep_supervision=False
    )
    assert type(network).__module__.startswith("medmamba.networks.")


def test_build_network_architecture_has_the_arguments_since_2_7():
    expected = [
        "plans_manager",
        "configuration_manager",
        "num_input_channels",
        "num_output_channels",
        "enable_deep_supervision",
    ]
    assert list(inspect.signature(nnUNetTrainer.build_network_architecture).parameters) == expected
    assert list(inspect.signature(MambaTrainer.build_network_architecture).parameters) == expected


def test_a_trainer_is_made_with_the_arguments_of_the_stock_one():
    expected = inspect.signature(nnUNetTrainer.__init__).parameters
    for trainer in TRAINERS.values():
        own = inspect.signature(trainer.__init__).parameters
        assert [(p.name, p.default) for p in own.values()] == [(p.name, p.default) for p in expected.values()]


def test_deep_supervision_is_switched_at_the_decoder(tiny_plans):
    network = build(tiny_plans)
    image = torch.zeros(1, 1, 16, 16, 16)
    trainer = SimpleNamespace(is_ddp=False, network=network)
    nnUNetTrainer.set_deep_supervision_enabled(trainer, False)
    assert isinstance(network(image), torch.Tensor)
    nnUNetTrainer.set_deep_supervision_enabled(trainer, True)
    assert isinstance(network(image), list)


def test_deep_supervision_scales_are_the_sizes_of_the_outputs(tiny_plans):
    trainer = SimpleNamespace(
        enable_deep_supervision=True, configuration_manager=PlansManager(tiny_plans).get_configuration("3d_fullres")
    )
    scales = nnUNetTrainer._get_deep_supervision_scales(trainer)
    outputs = build(tiny_plans)(torch.zeros(1, 1, 16, 16, 16))
    assert [list(o.shape[2:]) for o in outputs] == [[round(16 * factor) for factor in scale] for scale in scales]


def test_pretrained_weights_skip_the_heads_by_name(tiny_plans, tmp_path):
    manager = PlansManager(tiny_plans)
    source, target = (
        nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, classes)
        for classes in (5, 3)
    )
    heads = {k: v.clone() for k, v in target.state_dict().items() if ".seg_layers." in k}
    torch.save({"network_weights": source.state_dict()}, tmp_path / "weights.pth")
    load_pretrained_weights(target, str(tmp_path / "weights.pth"))
    state = target.state_dict()
    assert heads
    assert all(torch.equal(state[key], value) for key, value in heads.items())
    assert all(torch.equal(state[k], v) for k, v in source.state_dict().items() if ".seg_layers." not in k)


@pytest.mark.parametrize(
    "name",
    [name for name, variant in TRAINER_VARIANTS.items() if variant == TrainerVariant(variant.network)]
    + ["nnUNetTrainerMHSVM_DWConv_Finetune_50epochs"],
)
def test_the_variable_leads_nnunet_to_our_trainers(name, monkeypatch):
    monkeypatch.setenv(EXT_TRAINER, str(trainers_folder()))
    assert recursive_find_trainer_class_by_name(name) is TRAINERS[name]
    assert "medmamba_trainers" not in sys.modules
    assert str(trainers_folder()) not in sys.path


def test_the_variable_leads_a_spawned_child_to_our_trainers(monkeypatch):
    name = "nnUNetTrainerVMUNet"
    name = "nnUNetTrainerVMUNet"
    monkeypatch.setenv(EXT_TRAINER, str(trainers_folder()))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(recursive_find_trainer_class_by_name, name).result(timeout=300)
    assert found is TRAINERS[name]


def test_an_unknown_trainer_is_a_runtime_error_that_names_it(monkeypatch):
    monkeypatch.setenv(EXT_TRAINER, str(trainers_folder()))
    with pytest.raises(RuntimeError, match="nnUNetTrainerNobody"):
        recursive_find_trainer_class_by_name("nnUNetTrainerNobody")


def test_our_trainers_are_pickled_by_reference():
    for trainer in TRAINERS.values():
        assert pickle.loads(pickle.dumps(trainer)) is trainer


def test_train_and_predict_hold_the_lookup_under_its_own_name():
    from nnunetv2.inference import predict_from_raw_data

    for module in (run_training, predict_from_raw_data):
        assert module.recursive_find_trainer_class_by_name is recursive_find_trainer_class_by_name


def test_the_console_commands_are_entry_points():
    scripts = {e.name: e.value for e in distribution("nnunetv2").entry_points if e.group == "console_scripts"}
    assert scripts["nnUNetv2_train"] == "nnunetv2.run.run_training:run_training_entry"
    assert scripts["nnUNetv2_predict"] == "nnunetv2.inference.predict_from_raw_data:predict_entry_point"


def test_the_plans_manager_keeps_keys_it_does_not_know(tiny_plans):
    assert PlansManager(tiny_plans).plans["medmamba"]["note"] == "kept"


def test_a_configuration_keeps_its_own_architecture_over_an_inherited_one(load_plans):
    plans = load_plans("cascade")
    plans["configurations"]["3d_cascade_fullres"]["architecture"] = {"network_class_name": "own"}
    assert PlansManager(plans).get_configuration("3d_cascade_fullres").network_arch_class_name == "own"


def test_the_schedule_entries_are_attributes_of_the_stock_trainer(make_trainer, tiny_plans):
    trainer = make_trainer("nnUNetTrainerVMUNet", tiny_plans)
    stock = nnUNetTrainer(
        {**tiny_plans, "continue_training": False}, "3d_fullres", 0, trainer.dataset_json, trainer.device
    )
    for name, value in Schedule().to_dict().items():
        if name not in ("optimizer", "warmup_epochs", "lr_decay", "eps"):
            assert getattr(stock, name) == value, name


def test_the_learning_rate_is_stepped_with_the_number_of_the_epoch(make_trainer, tiny_plans):
    trainer = make_trainer("nnUNetTrainerVMUNet", tiny_plans)
    trainer.initialize()
    trainer.schedule = Schedule(num_epochs=10)
    trainer.lr_scheduler = WarmupLR(trainer.optimizer, trainer.schedule)
    trainer.current_epoch = 5
    trainer.on_train_epoch_start()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**0.9)


def test_autocast_without_a_dtype_takes_the_default_that_we_set():
    before = torch.get_autocast_dtype("cpu")
    with autocast_default("cpu", torch.float16), torch.autocast("cpu"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float16
    assert torch.get_autocast_dtype("cpu") == before


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_trainer_and_plans_give_the_same_network(configuration, tiny_plans):
    shapes = [
        {key: value.shape for key, value in build(tiny_plans, configuration, trainer=trainer).state_dict().items()}
        for trainer in (nnUNetTrainer, TRAINERS["nnUNetTrainerVMUNet"])
    ]
    assert shapes[0] == shapes[1]


def test_deep_supervision_changes_no_weight(tiny_plans):
    keys = [build(tiny_plans, deep_supervision=flag).state_dict().keys() for flag in (True, False)]
    assert keys[0] == keys[1]


def test_a_checkpoint_holds_what_nnunet_writes_and_our_key(make_trainer, tiny_plans, tmp_path):
    trainer = make_trainer("nnUNetTrainerVMUNet", tiny_plans)
    trainer.initialize()
    nnUNetTrainer.save_checkpoint(trainer, str(tmp_path / "stock.pth"))
    trainer.save_checkpoint(str(tmp_path / "ours.pth"))
    stock, ours = (torch.load(tmp_path / f"{name}.pth", weights_only=False) for name in ("stock", "ours"))
    assert set(ours) == {*stock, "medmamba"}
    assert stock["trainer_name"] == "nnUNetTrainerVMUNet"
    assert ours["trainer_name"] == "nnUNetTrainer"
    for key in ("current_epoch", "_best_ema", "inference_allowed_mirroring_axes"):
        assert ours[key] == stock[key]
    assert ours["network_weights"].keys() == stock["network_weights"].keys()


@pytest.mark.parametrize("plans", ["stock_plans", "tiny_plans"])
def test_a_checkpoint_predicts_without_our_trainers(plans, request, make_trainer, folders, monkeypatch):
    trainer = make_trainer("nnUNetTrainerVMUNet", request.getfixturevalue(plans))
    trainer.on_train_start()
    trainer.on_train_end()
    monkeypatch.setitem(sys.modules, "medmamba.nnunet.trainers", None)
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    expected = trainer.network.state_dict()
    loaded = predictor.network.state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert not predictor.network.decoder.deep_supervision
