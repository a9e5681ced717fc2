"""nnU-Net's three folders, its datasets and plans files, read without importing nnU-Net.

Everything here answers bad input with one line: what is wrong, and what to do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medmamba.command import CommandError

#: nnU-Net's variables and what lies in their folders.
FOLDERS = {
    "nnUNet_raw": "the datasets (DatasetXXX_Name folders with imagesTr, labelsTr and dataset.json)",
    "nnUNet_preprocessed": "plans and preprocessed data",
    "nnUNet_results": "trained models",
}

_DATASET = re.compile(r"Dataset(\d{3})_.+")


def folder(variable: str) -> Path:
    """The folder that a variable of nnU-Net names.

    Raises:
        CommandError: the variable is not set, or names no folder.
    """
    value = os.environ.get(variable)
    if not value:
        raise CommandError(
            f"{variable} is not set; it names the folder of {FOLDERS[variable]}: export {variable}=/some/folder"
        )
    if not Path(value).is_dir():
        raise CommandError(
            f"{variable} is {value}, which is not a folder; create it (mkdir -p) or correct the variable"
        )
    return Path(value)


def folder_or_none(variable: str) -> Path | None:
    """The folder that a variable names, or None when it is unset or missing."""
    value = os.environ.get(variable)
    return Path(value) if value and Path(value).is_dir() else None


def find_dataset(name_or_id: str, roots: Iterable[Path]) -> str:
    """Name of a dataset, from its name or number, as nnU-Net finds it.

    Args:
        name_or_id: ``Dataset004_Hippocampus``, ``4`` or ``004``.
        roots: folders to look in.

    Raises:
        CommandError: no such dataset, or two with the same number; the text lists what there is.
    """
    roots = list(roots)
    found = sorted(
        {path.name for root in roots for path in root.iterdir() if path.is_dir() and _DATASET.fullmatch(path.name)}
    )
    if name_or_id.isdigit():
        matches = [name for name in found if int(name[7:10]) == int(name_or_id)]
    else:
        matches = [name for name in found if name == name_or_id]
    if len(matches) > 1:
        raise CommandError(
            f"dataset number {name_or_id} belongs to {' and '.join(matches)}; give the full name or rename one"
        )
    if not matches:
        raise CommandError(
            f"no dataset {name_or_id!r} in {' or '.join(map(str, roots))}; "
            + (
                f"there are {', '.join(found)}"
                if found
                else "there is no dataset at all; expected DatasetXXX_Name folders"
            )
        )
    return matches[0]


def plans_names(dataset_folder: Path) -> list[str]:
    """Identifiers of the plans files of a preprocessed dataset, sorted."""
    return sorted(path.stem for path in dataset_folder.glob("*.json") if _is_plans(path))


def read_plans(dataset_folder: Path, plans_name: str) -> dict[str, Any]:
    """Read a plans file of a preprocessed dataset.

    Raises:
        CommandError: there is no such file (the text lists those there are), or it is no plans file.
    """
    path = dataset_folder / f"{plans_name}.json"
    if not path.is_file():
        known = plans_names(dataset_folder) if dataset_folder.is_dir() else []
        plan_first = "plan it first, with nnUNetv2_plan_and_preprocess and then `medmamba plan`"
        remedy = f"there are {', '.join(known)}" if known else plan_first
        raise CommandError(f"no plans {plans_name} in {dataset_folder}; {remedy}")
    return read_plans_file(path)


def read_plans_file(path: Path) -> dict[str, Any]:
    """Read a plans file, wherever it lies.

    Raises:
        CommandError: it is missing or cannot be read, or it is no plans file.
    """
    plans = read_json(path)
    if not isinstance(plans, dict) or "configurations" not in plans:
        raise CommandError(
            f"{path} is not a plans file: it has no configurations; plan the dataset again, or give a file of nnU-Net "
            "or `medmamba plan`"
        )
    return plans


def read_dataset_json_beside(plans: Path) -> dict[str, Any] | None:
    """The dataset.json in the folder of a plans file, or None if there is none.

    Raises:
        CommandError: it cannot be read.
    """
    path = plans.parent / "dataset.json"
    return read_json(path) if path.is_file() else None


def configuration_of(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration of the plans with what it inherits.

    Raises:
        CommandError: no such configuration; the text lists the known ones.
    """
    configurations = plans["configurations"]
    if name not in configurations:
        raise CommandError(
            f"plans {plans.get('plans_name')} have no configuration {name!r}; known: {', '.join(configurations)}"
        )
    merged: dict[str, Any] = {}
    visited: set[str] = set()
    while name is not None and name not in visited:
        visited.add(name)
        merged = {**configurations[name], **merged}
        name = configurations[name].get("inherits_from")
    return merged


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CommandError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read ({error}); restore it or create it again") from error


def _is_plans(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "configurations" in content and "plans_name" in content
