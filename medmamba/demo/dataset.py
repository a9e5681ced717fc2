"""The demo's input: a folder in nnU-Net raw layout, checked before anything is written.

    DIR/dataset.json
    DIR/imagesTr/CASE_0000.nii.gz   one file per channel: _0000, _0001, ...
    DIR/labelsTr/CASE.nii.gz

Layout: https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.command import CommandError

#: The eight volumes that come with the package.
SHIPPED = Path(__file__).resolve().parent / "data" / "Dataset004_Hippocampus"

#: Cases that are kept out of training: the last ones in alphabetical order.
NUM_UNSEEN = 2

#: What the demo reads; nnU-Net reads more, but the picture and the scores need a spacing and an orientation.
FILE_ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd")

_EXPECTED = "expected nnU-Net raw layout: dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz"


@dataclass(frozen=True)
class Case:
    """One volume: its channels in order, and its reference label map."""

    name: str
    images: tuple[Path, ...]
    label: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.images, self.label)


@dataclass(frozen=True)
class Dataset:
    """Cases to train on and cases to predict.

    Attributes:
        folder: where the files are.
        name: ``DatasetNNN_Name``, as nnU-Net wants it.
        description: content of dataset.json.
        training: cases the network sees.
        unseen: cases it does not see before it predicts them.
    """

    folder: Path
    name: str
    description: dict[str, Any]
    training: tuple[Case, ...]
    unseen: tuple[Case, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        return self.training + self.unseen

    @property
    def file_ending(self) -> str:
        return str(self.description["file_ending"])

    @property
    def is_shipped(self) -> bool:
        return self.folder == SHIPPED

    @property
    def structures(self) -> dict[str, int | list[int]]:
        """Structure name to its label or labels, without background."""
        return {name: label for name, label in self.description["labels"].items() if label != 0}


def read_dataset(folder: Path | None = None) -> Dataset:
    """Find the cases of a dataset and set the last ones aside. Looks at names and dataset.json, not into volumes.

    Args:
        folder: nnU-Net raw layout; None takes the volumes that come with the package.

    Raises:
        CommandError: something is missing or does not fit; one line with cause and remedy.
    """
    folder = SHIPPED if folder is None else folder.expanduser().resolve()
    if not folder.is_dir():
        raise CommandError(f"no folder {folder}; {_EXPECTED}")
    description = _read_description(folder / "dataset.json")
    for part in ("imagesTr", "labelsTr"):
        if not (folder / part).is_dir():
            raise CommandError(f"{folder} has no {part}; {_EXPECTED}")
    cases = _find_cases(folder, description)
    if len(cases) < NUM_UNSEEN + 1:
        raise CommandError(
            f"{folder} has {len(cases)} case(s); the demo needs at least {NUM_UNSEEN + 1}: "
            f"{NUM_UNSEEN} to predict and 1 to train on"
        )
    return Dataset(
        folder=folder,
        name=_nnunet_name(folder.name),
        description=description,
        training=tuple(cases[:-NUM_UNSEEN]),
        unseen=tuple(cases[-NUM_UNSEEN:]),
    )


def check_volumes(dataset: Dataset) -> None:
    """Read every volume once and compare it with its label map.

    Raises:
        CommandError: a file cannot be read, is not 3D, holds NaN or infinity, does not lie on the grid of its label
            map, or the label map holds a value that dataset.json does not name.
    """
    known = {0}
    for labels in dataset.structures.values():
        known |= {labels} if isinstance(labels, int) else set(labels)
    problems = [f"{case.name}: {problem}" for case in dataset.cases if (problem := _problem_of(case, known))]
    if problems:
        more = f" (and {len(problems) - 1} more cases with problems)" if len(problems) > 1 else ""
        raise CommandError(f"{dataset.folder}, case {problems[0]}{more}; repair or remove the case")


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CommandError(f"no file {path}; {_EXPECTED}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CommandError(f"{path} is not readable JSON ({error}); repair it") from error
    wanted = {"channel_names": dict, "labels": dict, "file_ending": str}
    for key, kind in wanted.items():
        if not isinstance(description, dict) or not isinstance(description.get(key), kind) or not description[key]:
            raise CommandError(f"{path} has no usable entry {key!r}; nnU-Net needs {', '.join(wanted)}")
    labels = description["labels"]
    if "ignore" in labels:
        raise CommandError(f"{path} has an ignore label, which the demo cannot score; use medmamba plan and train")
    flat = [value for entry in labels.values() for value in (entry if isinstance(entry, list) else [entry])]
    if labels.get("background") != 0 or len(labels) < 2 or not all(type(value) is int for value in flat):
        raise CommandError(f"{path} needs labels as whole numbers, background 0 and at least one structure")
    if description["file_ending"] not in FILE_ENDINGS:
        known = ", ".join(FILE_ENDINGS)
        raise CommandError(f"{path} says file_ending {description['file_ending']!r}; the demo reads {known}")
    return dict(description)


def _find_cases(folder: Path, description: dict[str, Any]) -> list[Case]:
    ending, num_channels = description["file_ending"], len(description["channel_names"])
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(ending))
    present = sorted(path.name for path in (folder / "imagesTr").iterdir() if not path.name.startswith("."))
    matches = [match for name in present if (match := pattern.fullmatch(name))]
    if not matches:
        found = f"it holds {len(present)} other file(s) such as {present[0]}" if present else "it is empty"
        raise CommandError(f"{folder / 'imagesTr'} has no file named CASE_0000{ending}: {found}; {_EXPECTED}")
    cases = []
    for name in sorted({match[1] for match in matches}):
        images = tuple(folder / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(num_channels))
        case = Case(name, images, folder / "labelsTr" / f"{name}{ending}")
        missing = [path for path in case.files if not path.is_file()]
        if missing:
            raise CommandError(
                f"case {name} has no {missing[0].parent.name}/{missing[0].name}; dataset.json names {num_channels} "
                f"channel(s) and every case needs a label map: add the file or remove the case"
            )
        cases.append(case)
    return cases


def _nnunet_name(folder_name: str) -> str:
    if re.fullmatch(r"Dataset\d{3}_\w+", folder_name, re.ASCII) and "__" not in folder_name:
        return folder_name
    plain = re.sub(r"[^0-9A-Za-z]+", "_", folder_name).strip("_")
    return f"Dataset999_{plain or 'Own'}"


def _problem_of(case: Case, known_labels: set[int]) -> str | None:
    import numpy as np

    from medmamba.demo.volumes import check_nifti, read_volume

    try:
        for path in case.files:
            if path.name.endswith((".nii", ".nii.gz")):
                check_nifti(path)
        label = read_volume(case.label)
        found = Counter(np.unique(label.array).tolist())
        if strange := sorted(value for value in found if value not in known_labels):
            return f"label map holds {_some(strange)}, dataset.json names {_some(sorted(known_labels))}"
        for path in case.images:
            image = read_volume(path)
            if image.array.shape != label.array.shape:
                return f"{path.name} has shape {image.array.shape}, its label map {label.array.shape} (z, y, x)"
            if not np.allclose(image.spacing_mm, label.spacing_mm, rtol=1e-3):
                return f"{path.name} has spacing {image.spacing_mm} mm, its label map {label.spacing_mm} (z, y, x)"
            if not np.isfinite(image.array).all():
                return f"{path.name} holds NaN or infinity"
    except (RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return None


def _some(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:5]) + (", ..." if len(values) > 5 else "")
