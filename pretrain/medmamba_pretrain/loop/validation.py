"""Patients kept out of training, and one fixed crop with fixed masks of each of their volumes."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from medmamba.command import CommandError
from medmamba_pretrain.corpus.crops import CropReader
from medmamba_pretrain.corpus.store import Store
from medmamba_pretrain.loss import restored
from medmamba_pretrain.masking import mask_at
from medmamba_pretrain.model import Pretraining
from medmamba_pretrain.recipe import Recipe

from .normalisation import normalise
from .precision import Precision
from .stream import Crops, crop_of

#: Volumes that are looked at; more would only take longer.
_MOST_CROPS = 16


def held_out(store: Store, patients: int) -> list[str]:
    """The volumes of some patients, chosen by a hash of their names: sorted ids.

    Raises:
        CommandError: the corpus has no patient beside them.
    """
    names = sorted({record.patient for record in store.accepted.values()}, key=_hash)
    if patients and len(names) <= patients:
        raise CommandError(
            f"{store.folder} has {len(names)} patients, and the recipe keeps {patients} of them for validation; ingest "
            "more, or --set validation_patients=0"
        )
    chosen = frozenset(names[:patients])
    return sorted(volume for volume, record in store.accepted.items() if record.patient in chosen)


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


class Outcome(NamedTuple):
    """Of one validation; everything on the CPU.

    Attributes:
        loss: mean squared error of the normalised target units.
        image: (B, C, *spatial), normalised.
        visible: (B, 1, *spatial) bool.
        predicted: (B, C, *spatial), the image with its target units as predicted and all other masked units 0.
    """

    loss: float
    image: Tensor
    visible: Tensor
    predicted: Tensor


class Validation:
    """Fixed crops and their masks, which depend on nothing but the volume.

    Args:
        reader: of the corpus.
        volumes: ids, from :func:`held_out`; at least one.
        recipe: of the run.
        units: of a patch.
        precision: to compute in, and where.

    Raises:
        CommandError: none of the volumes can be read.
    """

    def __init__(
        self, reader: CropReader, volumes: list[str], recipe: Recipe, units: tuple[int, ...], precision: Precision
    ) -> None:
        drawn = [self._crop(reader, volume, recipe, units) for volume in volumes[:_MOST_CROPS]]
        readable = [crop for crop in drawn if not int(crop.damaged)]
        if not readable:
            raise CommandError(
                "no volume for validation can be read; `medmamba pretrain corpus STORE --verify` names the damaged "
                "ones, ingesting again restores them"
            )
        crops = Crops(*default_collate(readable))
        self.image = normalise(crops.stored, crops.constants, precision.dtype)
        self.visible, self.target = crops.visible, crops.target
        self._precision = precision

    def _crop(self, reader: CropReader, volume: str, recipe: Recipe, units: tuple[int, ...]) -> Crops:
        generator = np.random.default_rng(int(volume, 16))
        return crop_of(reader, recipe, units, generator, volume=volume)

    @torch.no_grad()
    def run(self, model: Pretraining) -> Outcome:
        """Predict what is hidden of every crop."""
        was_training = model.training
        model.eval()
        count, loss, pictures = int(self.target.sum()), 0.0, []
        for i in range(len(self.image)):
            image = self.image[i : i + 1].to(self._precision.device)
            visible, target = self.visible[i : i + 1], self.target[i : i + 1]
            with self._precision.autocast():
                prediction = model.predict(image, visible)
            loss += float(model.loss(prediction, image, target, count))
            pictures.append(restored(prediction, image, visible, target).cpu())
        model.train(was_training)
        seen = mask_at(self.visible, self.image.shape[2:]).unsqueeze(1)
        return Outcome(loss, self.image, seen, torch.cat(pictures))
