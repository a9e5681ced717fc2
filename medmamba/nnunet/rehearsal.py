"""A rehearsal before epoch 0: what would end a training after hours is tried in its first minute.

Two iterations, a checkpoint that is written and read back, and one validation case that is predicted, exported and
compared with its reference. Nothing of it stays: weights, optimizer and random numbers are those of before.
``MEDMAMBA_REHEARSAL=0`` leaves it out.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from medmamba.inference.machine import peak_bytes
from medmamba.nnunet.errors import UserFacingError
from medmamba.training.live import duration
from medmamba.training.saving import save
from medmamba.training.seeds import Purpose
from medmamba.training.settings import REHEARSAL
from medmamba.weights import read_training

if TYPE_CHECKING:
    from medmamba.nnunet.lasting import LastingTrainer

_ITERATIONS = 2
#: Checkpoints that are on the disk at the same time: latest, previous, best, and one that is being written.
_CHECKPOINTS = 4
#: Validation cases among which the smallest is exported.
_LOOKED_AT = 50
_GIB = 2**30


class RehearsalError(UserFacingError, RuntimeError):
    """The rehearsal found what would have ended the training later; the text says what and what to do."""


def rehearse(trainer: LastingTrainer) -> None:
    """Rehearse a training that is ready to begin, and print what it will take.

    Raises:
        RehearsalError: the disk is too small, a checkpoint does not come back as it was written.
        Exception: whatever training, prediction, export or evaluation raise.
    """
    trainer.print_to_log_file(f"Rehearsal ({REHEARSAL}=0 leaves it out):")
    before = deepcopy(trainer.checkpoint(0, 0))
    size = _try_checkpoint(trainer, before) if trainer.local_rank == 0 and not trainer.disable_checkpointing else 0
    seconds = _try_iterations(trainer)
    if trainer.local_rank == 0:
        _try_export(trainer)
    if trainer.is_ddp:
        dist.barrier()
    trainer.restore(before)
    for line in _report(trainer, *seconds, size):
        trainer.print_to_log_file(line)


def _try_checkpoint(trainer: LastingTrainer, content: dict[str, Any]) -> int:
    """Write and read back; returns its bytes."""
    path = trainer.folder / "rehearsal.pth"
    try:
        save(path, content)
        back, size = read_training(path), path.stat().st_size
    finally:
        path.unlink(missing_ok=True)
    weights = content["network_weights"]
    if not all(torch.equal(value.cpu(), back["network_weights"][name]) for name, value in weights.items()):
        raise RehearsalError(f"a checkpoint written to {path.parent} does not hold what was written; check that disk")
    free = shutil.disk_usage(path.parent).free
    if free < _CHECKPOINTS * size:
        raise RehearsalError(
            f"{path.parent} has {free / _GIB:.2f} GiB left; a training keeps up to {_CHECKPOINTS} checkpoints of "
            f"{size / _GIB:.2f} GiB there: make room, or leave the rehearsal out with {REHEARSAL}=0"
        )
    return size


def _try_iterations(trainer: LastingTrainer) -> tuple[float, float]:
    """Train twice and validate once; returns the seconds of the last iteration and of the validation step."""
    trainer.network.train()
    trainer.lr_scheduler.step(0)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    batches = [trainer.next_batch() for _ in range(_ITERATIONS)]
    trained = 0.0
    for number, batch in enumerate(batches):
        trainer.seeds.seed_all(Purpose.STEP, number)
        started = time.monotonic()
        trainer.train_step(batch)
        trained = time.monotonic() - started
    trainer.waiting = batches
    trainer.network.eval()
    batch = next(trainer.dataloader_val)
    trainer.waiting_to_validate = [deepcopy(batch)]  # nnU-Net changes targets with an ignore label in place
    with torch.no_grad():
        started = time.monotonic()
        trainer.validation_step(batch)
    return trained, time.monotonic() - started


def _try_export(trainer: LastingTrainer) -> None:
    """Predict the smallest validation case in the quickest way, export it and compare it with its reference."""
    _, names = trainer.do_split()
    cases = trainer.dataset_class(
        trainer.preprocessed_dataset_folder,
        names,
        folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage,
    )
    if not names:
        trainer.print_to_log_file("  this fold has no validation case to export")
        return
    name = min(names[:_LOOKED_AT], key=lambda one: int(np.prod(cases.load_case(one)[0].shape)))
    data, _, previous, properties = cases.load_case(name)
    values = np.asarray(data[:])
    if trainer.is_cascaded:
        foreground = trainer.label_manager.foreground_labels
        values = np.vstack((values, convert_labelmap_to_one_hot(previous[:], foreground, output_dtype=values.dtype)))
    logits = _predictor(trainer).predict_sliding_window_return_logits(torch.from_numpy(values)).cpu()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    ending = trainer.dataset_json["file_ending"]
    manager = trainer.label_manager
    with tempfile.TemporaryDirectory(prefix="rehearsal_", dir=trainer.folder) as folder:
        exported = Path(folder) / name
        export_prediction_from_logits(
            logits,
            properties,
            trainer.configuration_manager,
            trainer.plans_manager,
            trainer.dataset_json,
            str(exported),
            num_threads_torch=torch.get_num_threads(),
        )
        compute_metrics(
            str(Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations" / f"{name}{ending}"),
            f"{exported}{ending}",
            trainer.plans_manager.image_reader_writer_class(),
            manager.foreground_regions if manager.has_regions else manager.foreground_labels,
            manager.ignore_label,
        )


def _predictor(trainer: LastingTrainer) -> nnUNetPredictor:
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(
        tile_step_size=1.0,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=trainer.device.type == "cuda",
        device=trainer.device,
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        None,
    )
    return predictor


def _report(trainer: LastingTrainer, trained_s: float, validated_s: float, checkpoint_bytes: int) -> list[str]:
    epoch_s = trained_s * trainer.num_iterations_per_epoch + validated_s * trainer.num_val_iterations_per_epoch
    lines = [
        f"  an iteration takes {trained_s:.2f} s, so an epoch about {duration(epoch_s)} and "
        f"{trainer.num_epochs} epochs {duration(epoch_s * trainer.num_epochs)}, where batches come in time"
    ]
    if trainer.device.type == "cuda":
        lines.append(f"  GPU memory: {torch.cuda.max_memory_reserved(trainer.device) / _GIB:.1f} GiB at most")
    peak = peak_bytes()
    if peak is not None:
        lines.append(f"  memory of this process: {peak / _GIB:.1f} GiB at most")
    if checkpoint_bytes:
        free = shutil.disk_usage(trainer.folder).free
        lines.append(f"  a checkpoint takes {checkpoint_bytes / 2**20:.1f} MiB of {free / _GIB:.1f} GiB free")
    lines.append("  checkpoint, training, validation, export and evaluation work")
    return lines
