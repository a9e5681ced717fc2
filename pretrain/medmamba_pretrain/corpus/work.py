"""What is done with one source, in whichever process: read, prepare, write. Never raises for a bad image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.inference.orientation import axis_codes
from medmamba.inference.reading import Image, ImageRefused, read_image

from . import intensity
from .patients import hashed, patient_of
from .prepare import Prepared, prepare
from .record import Record
from .settings import Settings
from .sources import Source
from .volume import content_hash, volume_path, write_volume


@dataclass(frozen=True)
class Task:
    """One source to work on.

    Attributes:
        source: what to read.
        store: folder of the store; every process must see it under this path.
        settings: of the store.
        salt: of the store.
        write: False for what is read only to know its content.
    """

    source: Source
    store: Path
    settings: Settings
    salt: bytes
    write: bool = True


class StoreFailedError(Exception):
    """The store could not be written: full, or no permission. Not the fault of an image."""


def work(task: Task) -> Record:
    """Read one source and write its volume; status "accepted" or "rejected".

    Raises:
        StoreFailedError: the store cannot be written.
    """
    source = task.source
    plain = Record(
        source=source.key,
        stamp=source.stamp,
        status="rejected",
        patient=patient_of(source.key, task.settings.patients),
        modality=task.settings.modality,
        version=version("medmamba"),
    )
    try:
        if source.kind == "unreadable":
            _refuse_unreadable(source.path)
        image = read_image(source.path)
        prepared = prepare(image, task.settings)
    except ImageRefused as refusal:
        return _with(plain, code=refusal.code, reason=refusal.text)
    except OSError as error:
        return _with(plain, code="not-opened", reason=f"it cannot be opened ({error.strerror or error}); check rights")
    except MemoryError:
        return _with(plain, code="memory", reason="the memory does not suffice to read it; use fewer --jobs")
    except Exception as error:  # a bug of ours or of a library: one image must not end the run
        return _with(plain, code="internal", reason=f"{type(error).__name__}: {error}; please report it")
    return _stored(plain, task, image, prepared)


def _stored(plain: Record, task: Task, image: Image, prepared: Prepared) -> Record:
    volume = content_hash(prepared.values)
    path = volume_path(task.store, volume)
    size = 0
    if task.write:
        try:
            size = write_volume(path, prepared.values)
        except OSError as error:
            raise StoreFailedError(f"{path} cannot be written ({error.strerror or error})") from error
    patient = image.tags.get("patient", "")
    return _with(
        plain,
        status="accepted",
        volume=volume,
        patient=hashed(patient, task.salt) if patient else plain.patient,
        shape=prepared.values.shape,
        spacing_mm=task.settings.spacing_mm,
        affine=tuple(tuple(round(float(value), 6) for value in row) for row in prepared.affine),
        scale=prepared.coding.scale,
        offset=prepared.coding.offset,
        intensity=intensity.summary_of(prepared.values, prepared.coding),
        source_shape=tuple(image.values.shape),
        source_spacing_mm=tuple(float(np.round(size, 4)) for size in image.spacing_mm),
        source_axes=axis_codes(image.affine),
        notes=tuple(note.text for note in image.notes),
        size_bytes=size,
    )


def _with(record: Record, **changes: Any) -> Record:
    return replace(record, **changes)


def _refuse_unreadable(path: Path) -> None:
    if path.is_dir():
        raise ImageRefused("not-opened", "the folder cannot be opened; check its rights")
    raise ImageRefused(
        "format", f"{''.join(path.suffixes[-2:]) or path.name} is not read; convert or unpack to .nii.gz, .mha or .nrrd"
    )
