"""Two processes that share a batch, as on two GPUs: asked to stop is both or none, and both go on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from medmamba.training.checkpoints import BEST, FINAL, LATEST, candidates
from medmamba.weights import read_training

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("two_lives.py")
SCHEDULE = {
    "num_epochs": 3,
    "num_iterations_per_epoch": 3,
    "num_val_iterations_per_epoch": 1,
    "optimizer": "AdamW",
}


@pytest.fixture(scope="module")
def prepared(folder, raw_cases, plans_to_train):
    folder.add_dataset(raw_cases, plans_to_train(SCHEDULE, "WholePlans", "AskedPlans"))
    return folder


@pytest.fixture
def train(prepared, monkeypatch):
    """Trains in two processes; returns their exit codes, what the first has printed, and the folder of the fold."""
    monkeypatch.setenv("MEDMAMBA_SEED", "5")

    def run(plans_name: str, *steps_of_second: int, rehearsal: str = "0"):
        monkeypatch.setenv("MEDMAMBA_REHEARSAL", rehearsal)
        rendezvous = prepared.root / "rendezvous"
        rendezvous.unlink(missing_ok=True)
        command = [sys.executable, str(WORKER)]
        processes = [
            prepared.start(*command, str(rank), str(prepared.root), plans_name, *map(str, steps))
            for rank, steps in ((0, ()), (1, steps_of_second))
        ]
        printed = [process.communicate(timeout=600)[0] for process in processes]
        fold = prepared.results / "Dataset901_Isotropic" / f"nnUNetTrainerVMUNet__{plans_name}__3d_fullres" / "fold_0"
        return [process.returncode for process in processes], printed[0], fold

    return run


def test_two_processes_stop_together_and_go_on_to_the_same_bits(train):
    codes, printed, fold = train("WholePlans", rehearsal="1")
    assert codes == [0, 0], printed[-4000:]
    assert "checkpoint, training, validation, export and evaluation work" in printed
    whole = read_training(fold / FINAL)
    codes, printed, fold = train("AskedPlans", 5)  # the second iteration of epoch 1, in the second process alone
    assert codes == [75, 75], printed[-4000:]
    reached = candidates(fold)[0]
    assert (reached.path.name, reached.position) == (LATEST, (1, 2))
    assert len(read_training(reached.path)["medmamba"]["losses"]) == 2
    codes, printed, fold = train("AskedPlans")
    assert codes == [0, 0], printed[-4000:]
    assert f"Continuing from {LATEST}: epoch 1, iteration 2" in printed
    final = read_training(fold / FINAL)
    assert all(torch.equal(value, final["network_weights"][name]) for name, value in whole["network_weights"].items())
    assert final["logging"]["train_losses"] == whole["logging"]["train_losses"]
    assert final["_best_ema"] == whole["_best_ema"] == read_training(fold / BEST)["_best_ema"]
