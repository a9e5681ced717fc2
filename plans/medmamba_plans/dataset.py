"""The dataset that is planned: its folders, its stock plans, and the file of the new plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.command import CommandError
from medmamba.files import write_json
from medmamba.nnunet import folders

STOCK_PLANS = "nnUNetPlans"


@dataclass(frozen=True)
class Dataset:
    """A dataset of nnU-Net.

    Attributes:
        name: e.g. ``Dataset004_Hippocampus``.
        folder: of plans and preprocessed data.
        raw: ``nnUNet_raw``, or None where that is not set.
    """

    name: str
    folder: Path
    raw: Path | None

    @classmethod
    def find(cls, name_or_number: str) -> Dataset:
        """The dataset of this name or number.

        Raises:
            CommandError: nnUNet_preprocessed is not set, or there is no such dataset.
        """
        preprocessed = folders.folder("nnUNet_preprocessed")
        raw = folders.folder_or_none("nnUNet_raw")
        name = folders.find_dataset(name_or_number, [preprocessed, *([raw] if raw else [])])
        return cls(name, preprocessed / name, raw)

    @property
    def number(self) -> int:
        return int(self.name[7:10])

    def plans_path(self, plans_name: str) -> Path:
        return self.folder / f"{plans_name}.json"

    def why_no_raw(self) -> str | None:
        """Why the raw dataset cannot be read; None if it can."""
        if self.raw is None:
            return "nnUNet_raw is not set or not a folder"
        path = self.raw / self.name
        return None if (path / "dataset.json").is_file() else f"{path} has no dataset.json"

    def dataset_json(self) -> dict[str, Any]:
        """dataset.json beside the plans, or of the raw dataset.

        Raises:
            CommandError: there is none, or it cannot be read.
        """
        beside = folders.read_dataset_json_beside(self.plans_path(STOCK_PLANS))
        if beside is not None:
            return beside
        where = self.why_no_raw()
        if self.raw is None or where:
            raise CommandError(
                f"{self.folder} has no dataset.json, which names channels and classes, and there are no raw data "
                f"({where}); export nnUNet_raw"
            )
        content: dict[str, Any] = folders.read_json(self.raw / self.name / "dataset.json")
        return content

    def create_stock_plans(self, num_processes: int) -> None:
        """Make nnU-Net's own plans, which reads all cases.

        Raises:
            CommandError: nnU-Net refuses the dataset.
        """
        from medmamba_plans.stock import plan_with_nnunet

        plan_with_nnunet(self.name, num_processes)


def check_replaceable(path: Path, network: str, source: str) -> bool:
    """Whether there are plans of this name; only ours, for the same network and from the same source, are replaced.

    Raises:
        CommandError: other plans have this name.
    """
    if not path.exists():
        return False
    plans = folders.read_json(path)
    owner = plans.get("medmamba", {}) if isinstance(plans, dict) else {}
    if (owner.get("network"), owner.get("derived_from")) != (network, source):
        origin = f"the network {owner['network']} from {owner['derived_from']}" if owner else "something else"
        raise CommandError(f"{path} was made for {origin}; choose another --plans-name")
    return True


def write_plans(path: Path, plans: Mapping[str, Any]) -> None:
    """Write plans, atomically.

    Raises:
        CommandError: the folder cannot be written.
    """
    try:
        write_json(path, plans)
    except OSError as error:
        raise CommandError(f"{path} cannot be written ({error.strerror}); make the folder writable") from error
