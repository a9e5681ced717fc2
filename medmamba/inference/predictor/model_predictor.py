"""A model package as the predictor that a folder is run with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medmamba.inference.machine import threads_available
from medmamba.inference.model import Model
from medmamba.inference.orientation import Orientation, to_canonical
from medmamba.inference.protocol import Prediction
from medmamba.inference.reading import Image
from medmamba.inference.reading.content import has_content
from medmamba.mixers import token_mask

from .case import Window, predict_case
from .window import Forward, mean_of, with_mirroring


@dataclass(frozen=True)
class ModelPredictor:
    """Predicts with the folds of a model: their mean, mirrored where the model was trained so.

    Attributes:
        model: checked package.
        folds: of the model; empty: all.
        device: to compute on.
        step: largest distance of two tiles over their size.
        mirrors: whether to average over reflections.
        skips_air: whether tiles in which there is nothing are left out; see :mod:`.air`.
        masks_air: whether padding and the air around the patient are no tokens to the scans; see :mod:`.air`. For
            networks that were trained so: to others it is another input.
        max_ram_gb: what this process may hold, in 10^9 bytes; None: what machine and container leave to it. It changes
            no label, only the time; see :mod:`.strips`.
    """

    model: Model
    folds: Sequence[str] = ()
    device: str = "cpu"
    step: float = 0.5
    mirrors: bool = True
    skips_air: bool = False
    masks_air: bool = False
    max_ram_gb: float | None = None

    @property
    def id(self) -> str:
        return self.model.id

    @property
    def labels(self) -> Mapping[int, str]:
        return self.model.labels

    @property
    def channel_names(self) -> Sequence[str]:
        return self.model.channel_names

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the labels besides the model, for the report."""
        return {
            "folds": list(self.folds_used),
            "step": self.step,
            "mirrors": self.mirrors,
            "skips_air": self.skips_air,
            # Named only where it is on, so that results of versions that did not have it are kept.
            **({"masks_air": True} if self.masks_air else {}),
        }

    @property
    def folds_used(self) -> Sequence[str]:
        return self.folds or self.model.folds

    def prepare(self) -> None:
        """Load the weights now instead of with the first case.

        Raises:
            ModelRefused: see :meth:`medmamba.inference.model.Model.network`.
        """
        _ = self._forward

    def predict(self, channels: Sequence[Image], *, should_stop: Callable[[], bool]) -> Prediction:
        """See :class:`medmamba.inference.protocol.Predictor`. Images of one value each get an empty segmentation."""
        dtype = np.uint8 if max(self.labels) < 256 else np.uint16
        if not any(has_content(image) for image in channels):
            return Prediction(np.zeros(channels[0].values.shape, dtype), {"no_content": True})
        turned = [self._turned(image) for image in channels]
        values = np.stack([image.values for image, _ in turned])
        first, orientation = turned[0]
        spacing = first.spacing_mm
        most = None if self.max_ram_gb is None else int(self.max_ram_gb * 1e9)
        window = Window(self.step, should_stop, self.skips_air, self.masks_air, most)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nnU-Net's preprocessing warns of what was checked when the image was read
            labels = predict_case(
                values,
                spacing,
                self._forward,
                self.model.plans,
                self.model.configuration_name,
                self.model.outputs,
                window,
            )
        small = labels.astype(dtype, copy=False)
        facts = {"spacing_mm": list(spacing), **window.facts}
        return Prediction(small if orientation is None else orientation.undo(small), facts)

    @cached_property
    def networks(self) -> Sequence[torch.nn.Module]:
        """The networks of the folds, on the device.

        Raises:
            ModelRefused: see :meth:`medmamba.inference.model.Model.network`.
        """
        return [self.model.network(fold).to(self.device) for fold in self.folds_used]

    @cached_property
    def _forward(self) -> Forward:
        limit_threads()

        def on_device(network: torch.nn.Module) -> Forward:
            def forward(x: Tensor) -> Tensor:
                logits: Tensor = network(x.to(self.device))
                return logits

            return with_token_mask(network, forward) if self.masks_air else forward

        forward = mean_of([on_device(network) for network in self.networks])
        return with_mirroring(forward, self.model.mirror_axes) if self.mirrors else forward

    def _turned(self, image: Image) -> tuple[Image, Orientation | None]:
        if self.model.orientation == "file":
            return image, None
        values, orientation = to_canonical(image.values, image.affine)
        return replace(image, values=values, affine=orientation.affine), orientation


def with_token_mask(network: torch.nn.Module, forward: Forward) -> Forward:
    """A pass of a network whose last input channel says which voxels take part in its scans; see :mod:`.case`."""

    def masked(x: Tensor) -> Tensor:
        with token_mask(network, x[:, -1] > 0.5):
            return forward(x[:, :-1])

    return masked


def limit_threads() -> None:
    """Give torch no more threads than this process may keep busy, unless the user chose their number.

    torch takes all cores that it sees, nnU-Net at most eight of them. What torch does not see is a container's quota.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), threads_available()))
