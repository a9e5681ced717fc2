"""A folder that a training of nnU-Net really left, stock and ours, becomes a package with the same predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medmamba.inference.model import export_model, load_model

pytestmark = pytest.mark.slow


def stock_logits(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """Output of the network that nnU-Net's own predictor builds and loads."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    with torch.no_grad():
        return predictor.network.eval()(x)


@pytest.mark.parametrize("trainer", ["nnUNetTrainerVMUNet", "nnUNetTrainer"])
def test_a_trained_folder_becomes_a_package(
    trainer, make_trainer, tiny_plans, stock_plans, raw_cases, monkeypatch, tmp_path
):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from medmamba.nnunet.trainers import TRAINERS

    monkeypatch.setitem(TRAINERS.made, "nnUNetTrainer", nnUNetTrainer)
    training = make_trainer(trainer, tiny_plans if trainer != "nnUNetTrainer" else stock_plans)
    training.num_epochs, training.num_iterations_per_epoch, training.num_val_iterations_per_epoch = 1, 2, 1
    monkeypatch.setattr(training, "perform_actual_validation", lambda *_: None)
    training.run_training()
    folder = Path(training.output_folder_base)
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    if trainer == "nnUNetTrainer":
        with pytest.raises(Exception, match="numpy"):
            torch.load(checkpoint, weights_only=True)
    else:
        assert torch.load(checkpoint, weights_only=True)["current_epoch"] == 1

    model = export_model(folder, tmp_path / "model")
    assert (model.folds, model.orientation, model.mirror_axes) == (("0",), "file", (0, 1, 2))
    assert model.description.trainer == trainer
    assert model.description.epochs == {"0": 1}
    assert model.fingerprint is None  # that of the test's dataset is empty
    assert dict(model.labels) == {0: "background", 1: "Anterior", 2: "Posterior"}
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model").network(0)(x), stock_logits(folder, x))
    assert json.loads((tmp_path / "model" / "model.json").read_text())["dataset"]["name"] == raw_cases.name
