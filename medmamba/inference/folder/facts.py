"""What a report says besides success: the machine, the run's versions, and what the labels look like."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.inference.machine import peak_bytes, physical_bytes
from medmamba.inference.reading import Image
from medmamba.inference.writing import WriteFailed

_LIBRARIES = ("medmamba", "torch", "nnunetv2", "numpy", "scipy", "nibabel", "SimpleITK")


def versions() -> dict[str, str]:
    """Of this package and what results depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What speed and memory depend on; neither the name of the machine nor of its user."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "ram_mb": _ram_mb(),
    }


def command_without_folders(command: Sequence[str]) -> list[str]:
    """A command line with the last part of every path: folders hold names of users and projects."""
    words = []
    for word in command:
        option, separator, value = word.partition("=")
        if separator and option.startswith("-"):
            words.append(f"{option}={Path(value).name if '/' in value else value}")
        else:
            words.append(Path(word).name if "/" in word else word)
    return words


def peak_ram_mb() -> int | None:
    """The most memory this process has held since it started, in MiB; None where the system does not say."""
    peak = peak_bytes()
    return None if peak is None else peak >> 20


def label_facts(labels: NDArray[Any], like: Image, names: Mapping[int, str]) -> dict[str, Any]:
    """Volume and place of every label but the background.

    Args:
        labels: (D, H, W) of whole numbers.

    Returns:
        labels: by value as text: name, voxels, ml, and whether it touches a face of the volume.
        empty_labels: names of what is not there.
        touching_border: names of what touches a face.

    Raises:
        WriteFailed: labels that are none, or one without a name.
    """
    if labels.ndim != 3 or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise WriteFailed("labels", f"the predictor returned {labels.dtype} of shape {labels.shape}, no labels")
    counts = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    for plane in labels:  # of a whole volume, bincount would make a copy of eight bytes per voxel
        counts += np.bincount(plane.ravel(), minlength=len(counts))
    unknown = [int(value) for value in np.flatnonzero(counts) if value and int(value) not in names]
    if unknown:
        raise WriteFailed("labels", f"the predictor returned labels that the model does not have: {unknown[:10]}")
    voxel_ml = abs(float(np.linalg.det(like.affine[:3, :3]))) / 1000
    faces = _on_faces(labels)
    rows = {}
    for value in sorted(value for value in names if value):
        count = int(counts[value]) if value < len(counts) else 0
        touches = value in faces
        rows[str(value)] = {"name": names[value], "voxels": count, "ml": round(count * voxel_ml, 3), "border": touches}
    return {
        "labels": rows,
        "empty_labels": [row["name"] for row in rows.values() if not row["voxels"]],
        "touching_border": [row["name"] for row in rows.values() if row["border"]],
    }


def _on_faces(labels: NDArray[Any]) -> set[int]:
    if not labels.size:
        return set()
    faces = [face for axis in range(3) for face in (labels.take(0, axis), labels.take(-1, axis))]
    return {int(value) for face in faces for value in np.unique(face)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _ram_mb() -> int | None:
    ram = physical_bytes()
    return None if ram is None else ram >> 20
