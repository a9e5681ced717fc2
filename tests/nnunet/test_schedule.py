"""The schedule as data, and the learning rate it stands for."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from medmamba.networks import NETWORKS
from medmamba.nnunet.optimisation import WarmupLR, configure, learning_rate
from medmamba.nnunet.schedule import OPTIMIZERS, Schedule, ScheduleError


def test_a_schedule_survives_json():
    schedule = Schedule.create(num_epochs=3, optimizer="AdamW", warmup_epochs=1)
    assert Schedule.create(**json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize("plans", [{}, {"medmamba": {}}, {"medmamba": {"schedule": {}}}], ids=str)
def test_plans_without_a_schedule_train_as_nnunet_does(plans):
    assert Schedule.from_plans(plans) == Schedule()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rates_not_given_are_those_of_the_optimizer(optimizer):
    schedule = Schedule.create(optimizer=optimizer)
    assert {"initial_lr": schedule.initial_lr, "weight_decay": schedule.weight_decay} == OPTIMIZERS[optimizer]
    assert Schedule.create(optimizer=optimizer, initial_lr=0.5).initial_lr == 0.5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"num_iterations_per_epoch": 2.5}, "num_iterations_per_epoch is 2.5"),
        ({"num_val_iterations_per_epoch": True}, "num_val_iterations_per_epoch is True"),
        ({"save_every": "50"}, "save_every is '50'"),
        ({"initial_lr": 0}, "initial_lr is 0"),
        ({"initial_lr": float("nan")}, "initial_lr is nan"),
        ({"weight_decay": -1e-5}, "weight_decay is -1e-05"),
        ({"eps": 0}, "eps is 0"),
        ({"lr_decay": "step"}, "no lr_decay 'step'; known: poly, cosine"),
        ({"warmup_epochs": 1000}, "warmup_epochs is 1000; expected a whole number below num_epochs = 1000"),
        ({"optimizer": "Adam"}, "no optimizer 'Adam'; known: SGD, AdamW"),
        ({"epochs": 5}, "unknown schedule entry epochs; known: num_epochs"),
    ],
    ids=str,
)
def test_a_bad_entry_is_named_with_what_is_expected(entry, message):
    with pytest.raises(ScheduleError, match=message.replace("(", r"\(")):
        Schedule.create(**entry)


def test_without_warmup_the_rate_is_nnunets():
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    schedule = Schedule(num_epochs=7)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=schedule.initial_lr)
    stock = PolyLRScheduler(optimizer, schedule.initial_lr, schedule.num_epochs)
    for epoch in range(7):
        stock.step(epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(epoch, schedule), rel=1e-12)


def test_warmup_rises_to_the_initial_rate_and_then_falls():
    schedule = Schedule(num_epochs=10, warmup_epochs=4, initial_lr=1.0)
    rates = [learning_rate(epoch, schedule) for epoch in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[-1] > 0


def test_cosine_falls_from_the_initial_rate_through_its_half_to_zero():
    schedule = Schedule(num_epochs=12, warmup_epochs=2, initial_lr=1.0, lr_decay="cosine")
    rates = [learning_rate(epoch, schedule) for epoch in range(13)]
    assert (rates[2], rates[7], rates[12]) == pytest.approx((1.0, 0.5, 0.0))
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))


@pytest.mark.parametrize("name", NETWORKS)
def test_adamw_has_the_settings_of_the_paper(name):
    adamw = NETWORKS[name].adamw
    schedule = Schedule.create(optimizer="AdamW", adamw=adamw)
    assert adamw.items() <= schedule.to_dict().items()
    assert Schedule.create(optimizer="AdamW", adamw=adamw, initial_lr=0.5).initial_lr == 0.5
    assert Schedule.create(adamw=adamw) == Schedule()


def test_eps_reaches_the_optimizer():
    built, _ = configure(torch.nn.Linear(1, 1), Schedule.create(optimizer="AdamW", eps=1e-4))
    assert {group["eps"] for group in built.param_groups} == {1e-4}


def test_finetuning_is_slower_and_warms_up():
    schedule = Schedule().for_finetuning()
    assert (schedule.initial_lr, schedule.warmup_epochs) == pytest.approx((1e-3, 50))
    assert Schedule(warmup_epochs=80).for_finetuning().warmup_epochs == 80
    assert Schedule(num_epochs=5).for_finetuning().warmup_epochs == 0


def test_a_resumed_schedule_continues_where_it_was():
    schedule = Schedule(num_epochs=6, warmup_epochs=2)
    straight, resumed = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
    stepper = WarmupLR(straight, schedule)
    for epoch in range(5):
        stepper.step(epoch)
    WarmupLR(resumed, schedule).step(4)
    assert straight.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_weights_decay(optimizer):
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.InstanceNorm3d(2, affine=True))
    built, _ = configure(network, Schedule.create(optimizer=optimizer, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    expected = {name: 0.1 if name == "0.weight" else 0.0 for name, _ in network.named_parameters()}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == expected
    assert type(built).__name__ == optimizer
