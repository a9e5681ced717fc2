"""Fingerprint and stock plans of a dataset that has none yet, through nnU-Net's public API."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from medmamba.command import CommandError
from medmamba.nnunet.errors import UserFacingError

_N_PROC_DA = "nnUNet_n_proc_DA"


def plan_with_nnunet(dataset: str, num_processes: int) -> None:
    """Write ``dataset_fingerprint.json`` and ``nnUNetPlans.json``; nnU-Net's own output appears only on
    failure.

    Args:
        dataset: its name; nnUNet_raw and nnUNet_preprocessed must be set.
        num_processes: child processes that read the cases.

    Raises:
        CommandError: nnU-Net refuses the dataset; its reason is in the text.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    extract_fingerprint(dataset, num_processes)
    with nnunet_at_work(dataset):
        plan_experiment_dataset(int(dataset[7:10]))


def extract_fingerprint(dataset: str, num_processes: int) -> None:
    """Write ``dataset_fingerprint.json`` unless it is there; otherwise as :func:`plan_with_nnunet`."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    with nnunet_at_work(dataset):
        extract_fingerprint_dataset(
            int(dataset[7:10]), num_processes=num_processes, clean=False, check_dataset_integrity=True
        )


@contextlib.contextmanager
def nnunet_at_work(dataset: str) -> Iterator[None]:
    """nnU-Net's own output appears only on failure, and what it raises becomes one line (CommandError)."""
    with _quiet_unless_failing(), _at_least_one_augmentation_process():
        try:
            yield
        except UserFacingError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CommandError(
                f"nnU-Net cannot plan {dataset}: {reason}; check the dataset with "
                f"`nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])} --verify_dataset_integrity`"
            ) from error


@contextlib.contextmanager
def _quiet_unless_failing() -> Iterator[None]:
    """Keep what nnU-Net prints; on an error it goes to standard error first."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            yield
    except UserFacingError:
        raise
    except BaseException:
        sys.stderr.write(output.getvalue())
        raise


@contextlib.contextmanager
def _at_least_one_augmentation_process() -> Iterator[None]:
    """nnU-Net's planner sets torch's threads to ``nnUNet_n_proc_DA``, and 0, good for training, stops it."""
    before = os.environ.get(_N_PROC_DA)
    if before == "0":
        os.environ[_N_PROC_DA] = "1"
    try:
        yield
    finally:
        if before == "0":
            os.environ[_N_PROC_DA] = before
