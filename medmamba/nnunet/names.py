"""Names in nnU-Net's house style, and where nnU-Net finds our trainers. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

#: nnU-Net >= 2.8 searches the folders in this variable (separated by ``os.pathsep``) for trainers.
EXT_TRAINER = "nnUNet_extTrainer"

#: Network name in the registry -> its spelling inside trainer and plans names.
HOUSE_NAMES = {
    "vmunet": "VMUNet",
    "mhsvm": "MHSVM",
    "msvmunet": "MSVMUNet",
    "mednext": "MedNeXt",
    "mednextmamba": "MedNeXtMamba",
}

#: Suffix of a trainer name -> number of epochs. Other schedules are data in the plans.
SHORT_SCHEDULES = {"_5epochs": 5, "_50epochs": 50, "_250epochs": 250}


def house_name(network: str) -> str:
    """``vmunet`` -> ``VMUNet``; a network of a third party is written in camel case."""
    return HOUSE_NAMES.get(network) or "".join(part[:1].upper() + part[1:] for part in network.split("_"))


def trainer_name(network: str) -> str:
    """Name of the trainer for a network: ``vmunet`` -> ``nnUNetTrainerVMUNet``."""
    return f"nnUNetTrainer{house_name(network)}"


#: Every trainer that medmamba offers. ``trainers.TRAINERS`` holds the classes under the same names.
TRAINER_NAMES = tuple(trainer_name(n) + suffix for n in HOUSE_NAMES for suffix in ("", *SHORT_SCHEDULES))


def plans_name(network: str, *variants: str) -> str:
    """Plans identifier: ``nnUNetMedMambaVMUNetPlans``, ``nnUNetMedMambaVMUNetIdentityPlans``."""
    return f"nnUNetMedMamba{house_name(network)}{''.join(house_name(variant) for variant in variants)}Plans"


def trainers_folder() -> Path:
    """Folder with the one module that hands our trainers to nnU-Net."""
    return Path(__file__).resolve().parent / "external"


def ext_trainer_value(environment: Mapping[str, str] = os.environ) -> str:
    """Value of ``nnUNet_extTrainer`` with our folder in it; folders that are already there stay."""
    folders = [folder for folder in environment.get(EXT_TRAINER, "").split(os.pathsep) if folder.strip()]
    ours = str(trainers_folder())
    return os.pathsep.join(folders if ours in folders else [*folders, ours])
