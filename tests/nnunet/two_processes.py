"""One of two processes that train together on CPUs, over gloo; started by ``test_two_processes.py``.

    python two_processes.py RANK FOLDER

FOLDER holds ``spec.json`` and nnU-Net's variables lead to prepared data. Writes ``result_RANK.json`` there. nnU-Net
itself trains on several GPUs only: what it does in ``initialize`` once a process group exists is done here by hand.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from medmamba.layers import DropPath
from medmamba.nnunet.guard import NonFiniteLossError
from medmamba.nnunet.trainers import TRAINERS, MambaTrainer

WORLD = 2
#: Name of the case that is trained and validated on real data.
WHOLE = "whole"


def make_trainers(spec: dict[str, Any]) -> dict[str, MambaTrainer]:
    """Trainers by the name of their case. Before the process group exists, or they would ask for a GPU.

    Those whose gradients are compared are in float64: in float32 an activation at the kink of a rectifier may fall on
    either side, by rounding.
    """
    trainers = {}
    for name, case in spec["cases"].items():
        plans = {**case["plans"], "continue_training": False}
        trainer = TRAINERS[case["trainer"]](plans, "3d_fullres", 0, spec["dataset_json"], torch.device("cpu"))
        trainer.enable_deep_supervision = case["deep_supervision"]
        trainer.initialize()
        if name != WHOLE:
            trainer.network.double()
        for module in trainer.network.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
        trainers[name] = trainer
    return trainers


def join_processes(trainer: MambaTrainer, rank: int) -> None:
    """What ``nnUNetTrainer.initialize`` does for several processes."""
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer._set_batch_size_and_oversample()
    trainer.network = DistributedDataParallel(trainer.network)
    trainer.loss = trainer._build_loss()


def batch_of(trainer: MambaTrainer) -> dict[str, Any]:
    """Two samples, the same in both processes."""
    generator = torch.Generator().manual_seed(1)
    size = trainer.configuration_manager.patch_size
    target = torch.randint(0, 3, (WORLD, 1, *size), generator=generator).float()
    scales = [1, 2, 4] if trainer.enable_deep_supervision else [1]
    targets = [target[:, :, ::step, ::step, ::step] for step in scales]
    data = torch.randn(WORLD, 1, *size, generator=generator).double()
    keys = [f"case_{i}" for i in range(WORLD)]
    return {"data": data, "target": targets if trainer.enable_deep_supervision else target, "keys": keys}


def share_of(batch: dict[str, Any], rank: int) -> dict[str, Any]:
    """The sample of one process."""

    def own(values: Any) -> Any:
        return [own(v) for v in values] if isinstance(values, list) else values[rank : rank + 1]

    return {"data": own(batch["data"]), "target": own(batch["target"]), "keys": batch["keys"][rank : rank + 1]}


def gradients_alone(trainer: MambaTrainer) -> dict[str, Tensor]:
    """Gradients of one process with both samples; the trainer stays as it was."""
    alone = deepcopy(trainer.network)
    loss, network, optimizer = trainer.loss, trainer.network, trainer.optimizer
    trainer.is_ddp = True  # nnU-Net weights the coarsest output by 1e-6 instead of 0 then
    trainer.loss = trainer._build_loss()
    trainer.is_ddp = False
    trainer.network = alone
    trainer.optimizer = torch.optim.SGD(alone.parameters(), lr=0.0)
    trainer.train_step(batch_of(trainer))
    trainer.loss, trainer.network, trainer.optimizer = loss, network, optimizer
    return {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}


def compare_gradients(trainer: MambaTrainer, rank: int) -> dict[str, Any]:
    """Step twice (an unused parameter is an error in the second step) and compare with one process."""
    expected = gradients_alone(trainer)
    join_processes(trainer, rank)
    share = share_of(batch_of(trainer), rank)
    trainer.train_step(share)
    named = {name.removeprefix("module."): p for name, p in trainer.network.named_parameters() if p.requires_grad}
    without = [name for name, p in named.items() if p.grad is None]
    difference = sum(float((p.grad - expected[name]).square().sum()) for name, p in named.items() if name in expected)
    total = sum(float(gradient.square().sum()) for gradient in expected.values())
    trainer.train_step(share)
    return {
        "without": without,
        "names agree": set(named) == set(expected),
        "error": (difference / total) ** 0.5,
        "batch size": trainer.batch_size,
    }


def save(trainer: MambaTrainer, rank: int, folder: Path) -> bool:
    """Whether this process writes a checkpoint."""
    path = folder / f"checkpoint_{rank}.pth"
    trainer.save_checkpoint(str(path))
    return path.exists()


def train_and_validate(trainer: MambaTrainer, rank: int) -> dict[str, Any]:
    """A whole training on real data, its validation included; nnU-Net's pools are threads here."""
    multiprocessing.get_context = lambda method=None: SimpleNamespace(Pool=ThreadPool)  # type: ignore[assignment,misc]
    join_processes(trainer, rank)
    trainer.run_training()
    trainer.perform_actual_validation()
    return {"losses": list(map(float, trainer.logger.get_value("train_losses", step=None)))}


def diverge(trainer: MambaTrainer, rank: int, spoil: Callable[[Tensor], Tensor]) -> str:
    """The error of this process when ``spoil`` is applied to the loss of the last one."""
    finite = trainer.loss
    if rank == WORLD - 1:
        trainer.loss = lambda output, target: spoil(finite(output, target))
    try:
        trainer.train_step(share_of(batch_of(trainer), rank))
    except NonFiniteLossError as error:
        return str(error)
    finally:
        trainer.loss = finite
    return "no error"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["MEDMAMBA_SEED"] = "0"
    spec = json.loads((folder / "spec.json").read_text())
    trainers = make_trainers(spec)
    whole = trainers.pop(WHOLE)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=5),
    )
    result: dict[str, Any] = {name: compare_gradients(trainer, rank) for name, trainer in trainers.items()}
    some = trainers[min(name for name in trainers if name.endswith(" heads"))]
    result["saves"] = save(some, rank, folder)
    result[WHOLE] = train_and_validate(whole, rank)
    result["infinite loss"] = diverge(some, rank, lambda loss: loss + float("inf"))
    result["infinite gradients"] = diverge(some, rank, lambda loss: loss * float("inf"))
    (folder / f"result_{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
