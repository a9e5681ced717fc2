"""Crops of the volumes of a store, decompressed where they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .record import Record
from .store import Store
from .volume import Volume


@dataclass(frozen=True)
class Crop:
    """Where to read.

    Attributes:
        volume: id.
        start: first voxel, D, H, W; negative where a volume is smaller than the crop and gets padded.
    """

    volume: str
    start: tuple[int, int, int]


class CropReader:
    """Draws and reads boxes of one size from the accepted volumes of a store.

    Drawing is apart from reading, so that what was read can be read again.

    Args:
        store: the store or its folder.
        size: of the crops, D, H, W.
        weights: "volume" (each equally often), "patient" (each patient equally often, then each of its volumes),
            "voxels" (by size), or a number per volume id; an id that is not there has weight 0.
        without: ids of volumes that are never drawn; they can be read.

    Attributes:
        ids: of the volumes, sorted.
        probabilities: (V,) float64 in the order of ``ids``.

    Raises:
        ValueError: no volume has a positive weight, or the rule is unknown.
        CommandError: there is no store in the folder.
    """

    def __init__(
        self,
        store: Store | str | Path,
        size: Sequence[int],
        weights: str | Mapping[str, float] = "volume",
        *,
        without: Collection[str] = (),
    ) -> None:
        self._store = store if isinstance(store, Store) else Store(store)
        self._records = self._store.accepted
        self.size = tuple(size)
        self.ids = sorted(self._records)
        hidden = frozenset(without)
        weight = np.array([0.0 if v in hidden else self._weight(weights, v) for v in self.ids], np.float64)
        if not (weight >= 0).all() or not weight.sum() > 0:
            folder = self._store.folder
            raise ValueError(f"no volume of {folder} has a positive weight; ingest some, or give other weights")
        self.probabilities = weight / weight.sum()

    def record(self, volume: str) -> Record:
        """What the manifest says about a volume.

        Raises:
            KeyError: the store has no such volume.
        """
        return self._records[volume]

    def draw(self, generator: np.random.Generator) -> Crop:
        """A random volume and a random place in it, uniform over all places where the crop fits."""
        return self.place(self.ids[int(generator.choice(len(self.ids), p=self.probabilities))], generator)

    def place(self, volume: str, generator: np.random.Generator) -> Crop:
        """A random place in a volume, uniform over all places where the crop fits."""
        room = [whole - size for whole, size in zip(self._records[volume].shape, self.size, strict=True)]
        d, h, w = (int(generator.integers(0, left + 1)) if left > 0 else left // 2 for left in room)
        return Crop(volume, (d, h, w))

    def read(self, crop: Crop) -> NDArray[np.int16]:
        """(D, H, W) stored values; beyond the borders of a volume its nearest voxels, repeated.

        Raises:
            KeyError: the store has no such volume.
            DamagedVolumeError: the volume's file is missing or damaged.
        """
        if crop.volume not in self._records:
            raise KeyError(f"no volume {crop.volume!r} in {self._store.folder}")
        volume = Volume(self._store.volume_path(crop.volume))
        nearest = [
            np.clip(np.arange(start, start + size), 0, whole - 1)
            for start, size, whole in zip(crop.start, self.size, volume.shape, strict=True)
        ]
        low = [int(places[0]) for places in nearest]
        inside = volume.crop(low, [int(places[-1]) + 1 - at for places, at in zip(nearest, low, strict=True)])
        if inside.shape == self.size:
            return inside
        return inside[np.ix_(*(places - at for places, at in zip(nearest, low, strict=True)))]

    def _weight(self, weights: str | Mapping[str, float], volume: str) -> float:
        if not isinstance(weights, str):
            return float(weights.get(volume, 0.0))
        record = self._records[volume]
        if weights == "volume":
            return 1.0
        if weights == "voxels":
            return float(np.prod(record.shape))
        if weights == "patient":
            return 1.0 / self._scans_per_patient[record.patient]
        raise ValueError(f"weights {weights!r}: known are volume, patient and voxels, or a number per volume")

    @cached_property
    def _scans_per_patient(self) -> Counter[str]:
        return Counter(record.patient for record in self._records.values())
