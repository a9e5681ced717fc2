"""One of two processes of a training on CPUs, over gloo; started by ``test_two_lives.py``.

    python two_lives.py RANK FOLDER PLANS_NAME [STEPS]

Trains to the end, or is asked to stop, this process alone, after STEPS training and validation steps. nnU-Net itself
trains on several GPUs only: what it does in ``initialize`` once a process group exists is done here by hand.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from torch.nn.parallel import DistributedDataParallel

from medmamba.nnunet.trainers import TRAINERS, MambaTrainer


def make_trainer(plans_name: str) -> MambaTrainer:
    """Before the process group exists, or it would ask for a GPU."""
    dataset = Path(os.environ["nnUNet_preprocessed"]) / "Dataset901_Isotropic"  # noqa: SIM112 (the name is of nnU-Net)
    plans = json.loads((dataset / f"{plans_name}.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    trainer = TRAINERS["nnUNetTrainerVMUNet"](plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.initialize()
    return trainer


def ask_after(trainer: MambaTrainer, steps: int) -> None:
    """SIGTERM to this process before step number ``steps``."""
    count = 0

    def counted(step: Any) -> Any:
        def stepping(batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal count
            if count == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            count += 1
            result: dict[str, Any] = step(batch)
            return result

        return stepping

    trainer.train_step = counted(trainer.train_step)  # type: ignore[method-assign]
    trainer.validation_step = counted(trainer.validation_step)  # type: ignore[method-assign]


def main(rank: int, folder: Path, plans_name: str, steps: int | None) -> None:
    torch.set_num_threads(1)
    LocalLogger.plot_progress_png = lambda *_: None  # type: ignore[method-assign]
    trainer = make_trainer(plans_name)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=3))
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer._set_batch_size_and_oversample()
    trainer.network = DistributedDataParallel(trainer.network)
    trainer.loss = trainer._build_loss()
    if steps is not None:
        ask_after(trainer, steps)
    trainer.run_training()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]) if sys.argv[4:] else None)
