"""What a training shows in TensorBoard.

:class:`Board` goes into the list ``loggers`` of nnU-Net's ``MetaLogger``, and takes what only our trainers measure
besides. The step of every value is the epoch.
"""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medmamba.diagnostics import StepSizes, TokenDynamics
from medmamba.training.event_files import event_writer
from medmamba.training.slices import slices_picture

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)

#: nnU-Net's names of what it logs every epoch, and ours.
TAGS = {
    "train_losses": "loss/train",
    "val_losses": "loss/validation",
    "lrs": "lr",
    "mean_fg_dice": "dice/mean",
    "ema_fg_dice": "dice/ema",
}
#: What runs are compared by: nnU-Net's pseudo Dice of random patches, averaged over epochs.
METRIC = TAGS["ema_fg_dice"]
_CLASS_DICE = re.compile(r"dice_per_class_or_region/class_(\d+)")
_STAGE = re.compile(r"\b(encoder|decoder)\.stages\.(\d+)")
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
_MAX_TEXT = 20_000

Values = ArrayLike | Tensor
_T = TypeVar("_T")


class Board:
    """Writes the event files of a run.

    No call raises where the disk is full or cannot be written: the first such error is a warning in the log, and from
    then on nothing more is written.

    Args:
        folder: of the event files, beside the checkpoints; made if missing.
        start: first epoch of this process; what an earlier one wrote from there on is hidden.
        class_names: of the foreground classes or regions, in the order of nnU-Net's Dice per class.
    """

    def __init__(self, folder: Path, *, start: int, class_names: Sequence[str]) -> None:
        self.folder = folder
        self._class_names = tuple(class_names)
        self._step = start
        self._epoch_start: tuple[int, float] | None = None
        self._has_hparams = False
        self._writer: SummaryWriter | None = None
        _say_disk_errors_once()
        try:
            self._writer = event_writer(folder, start)
        except OSError as error:
            self._switch_off(error)

    @property
    def is_on(self) -> bool:
        """Whether what is given is written: not after :meth:`close`, and not after a disk error."""
        return self._writer is not None

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Settings, nested or not, as text under ``config/<key>``; long ones are cut."""

        def write(writer: SummaryWriter) -> None:
            for key, value in config.items():
                writer.add_text(f"config/{key}", _as_text(value), self._step)

        self._write(write)
        self._flush()

    def log(self, key: str, value: Any, step: int) -> None:
        """One value of an epoch, by nnU-Net's name; the Dice of a class that no patch held (NaN) is left out."""
        self._step = step
        if key == "epoch_start_timestamps":
            self._epoch_start = (step, float(value))
            return
        if key == "epoch_end_timestamps":
            if self._epoch_start is not None and self._epoch_start[0] == step:
                self.scalars({"time/epoch_s": float(value) - self._epoch_start[1]}, step)
            return
        tag = self._tag(key)
        if tag.startswith("dice/") and math.isnan(value):
            return
        self._write(lambda writer: writer.add_scalar(tag, float(value), step))

    def log_summary(self, key: str, value: Any) -> None:
        """A value of the whole run, as the Dice of the final validation, under ``summary/<key>``."""
        if isinstance(value, int | float | np.number):
            self.scalars({f"summary/{key}": float(value)}, self._step)
        else:
            self.update_config({key: value})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Further values of an epoch by tag, as ``{"time/data_wait_s": 3.2}``."""

        def write(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, float(value), step)

        self._write(write)
        self._flush()

    def scans(self, sizes: Mapping[str, StepSizes], step: int) -> None:
        """Step sizes and memory of the scans, per stage of the network.

        Args:
            sizes: of :func:`medmamba.diagnostics.step_sizes` or :func:`medmamba.diagnostics.measure_step_sizes`.
            step: epoch.
        """
        self.scalars(scan_scalars(sizes), step)

    def dynamics(self, dynamics: Mapping[str, TokenDynamics], step: int) -> None:
        """Token dynamics of the scans, per stage of the network.

        Args:
            dynamics: of :func:`medmamba.diagnostics.token_dynamics`.
            step: epoch.
        """
        self.scalars(dynamics_scalars(dynamics), step)

    def overlay(self, image: Values, prediction: Values, reference: Values, step: int, name: str) -> None:
        """Three orthogonal planes (one in 2D) of image, reference and prediction under ``overlay/<name>``.

        Args:
            image: (*spatial), any number type, on any device.
            prediction: labels of the same shape; up to 0 is background.
            reference: labels of the same shape.
            step: epoch.
            name: of what is seen; the same one for all epochs makes a film.

        Raises:
            ValueError: the shapes differ, or are neither 2D nor 3D.
        """
        picture = slices_picture(_array(image), _array(reference), _array(prediction))
        self._write(lambda writer: writer.add_image(f"overlay/{name}", picture, step, dataformats="HWC"))
        self._flush()

    def hparams(self, values: Mapping[str, bool | str | float | int]) -> None:
        """What this run is compared by with others, in its own event file; only the first call counts."""
        if self._has_hparams or not self.is_on:
            return
        from torch.utils.tensorboard.summary import hparams

        self._has_hparams = True
        # The third part says that the run has ended well, which nobody knows yet.
        experiment, session, _ = hparams(dict(values), {METRIC: 0.0})

        def write(writer: SummaryWriter) -> None:
            for part in (experiment, session):
                writer.file_writer.add_summary(part, self._step)  # type: ignore[attr-defined]

        self._write(write)
        self._flush()

    def close(self) -> None:
        """Write what is left; further calls write nothing."""
        self._flush()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._switch_off(error)
        self._writer = None

    def _tag(self, key: str) -> str:
        match = _CLASS_DICE.fullmatch(key)
        if match is None:
            return TAGS.get(key, key)
        number = int(match[1])
        is_named = 1 <= number <= len(self._class_names)
        return f"dice/{self._class_names[number - 1] if is_named else f'class_{number}'}"

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._switch_off(error)

    def _flush(self) -> None:
        """The writer works in a thread of its own: what went wrong there is known after a flush."""
        self._write(lambda writer: writer.flush())

    def _switch_off(self, error: OSError) -> None:
        _log.warning("nothing more is written to %s (%s); the training goes on", self.folder, error)
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):  # the same again: it writes what is left and ends its thread
                writer.file_writer.close()  # type: ignore[attr-defined]


def scan_scalars(sizes: Mapping[str, StepSizes]) -> dict[str, float]:
    """Statistics of the scans by tag, as ``scan/encoder.stage_2/dt_mean``; a network without scans has none.

    Per stage, over all its scans, routes, channels and states: mean, smallest and largest step size dt, and quantiles
    of the memory 1 / (dt |A|), the tokens after which 37 % of a token's contribution are left.
    """
    found: dict[str, float] = {}
    for stage, members in _by_stage(sizes).items():
        dt = np.concatenate([member.dt.detach().double().cpu().flatten().numpy() for member in members])
        memory = np.concatenate([_memory(member) for member in members])
        values = {"dt_mean": dt.mean(), "dt_min": dt.min(), "dt_max": dt.max()}
        levels = np.quantile(memory, list(_QUANTILES.values()), method="inverted_cdf")
        values |= {f"memory_tokens_{name}": level for name, level in zip(_QUANTILES, levels, strict=True)}
        found |= {f"scan/{stage}/{name}": float(value) for name, value in values.items()}
    return found


def dynamics_scalars(dynamics: Mapping[str, TokenDynamics]) -> dict[str, float]:
    """Eigenvalues by tag, as ``scan/encoder.stage_2/eigenvalue_min``: smallest, largest, share of the negative ones.

    Per stage, over all its scans and routes; what they say is in :mod:`medmamba.diagnostics.dynamics`.
    """
    found: dict[str, float] = {}
    for stage, members in _by_stage(dynamics).items():
        values = {
            "eigenvalue_min": min(float(member.smallest.min()) for member in members),
            "eigenvalue_max": max(float(member.largest.max()) for member in members),
            "eigenvalue_negative": statistics.fmean(float(member.negative.mean()) for member in members),
        }
        found |= {f"scan/{stage}/{name}": value for name, value in values.items()}
    return found


def _by_stage(scans: Mapping[str, _T]) -> dict[str, list[_T]]:
    stages: dict[str, list[_T]] = defaultdict(list)
    for name, scan in scans.items():
        stages[_stage(name)].append(scan)
    return stages


def _memory(size: StepSizes) -> NDArray[np.float64]:
    """As :func:`medmamba.diagnostics.memory_tokens`; without end where dt is 0, which a training may reach."""
    dt, A = size.dt.detach().double().cpu(), size.A.detach().double().cpu()
    A = A.unsqueeze(-1) if A.dim() == dt.dim() else A
    memory: NDArray[np.float64] = (dt.unsqueeze(-1) * A.abs()).reciprocal().flatten().numpy()
    return memory


@cache
def _say_disk_errors_once() -> None:
    """TensorBoard's writer raises a disk error where it is called next; its thread need not print it as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        of_tensorboard = type(args.thread).__module__.partition(".")[0] == "tensorboard"
        if not (of_tensorboard and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook


def _array(values: Values) -> NDArray[Any]:
    return values.detach().cpu().float().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _stage(module: str) -> str:
    match = _STAGE.search(module)
    return f"{match[1]}.stage_{match[2]}" if match else module or "network"


def _as_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, indent=2, default=str)
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}\n... and {len(text) - _MAX_TEXT} characters more"
    return text if isinstance(value, str) else f"```json\n{text}\n```"
