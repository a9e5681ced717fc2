"""Names in nnU-Net's house style, and where nnU-Net finds our trainers. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from medmamba.presets import MIXERS

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

#: Networks without a scan, so without controls (``NetworkSpec.has_scans``, repeated to keep this file light).
WITHOUT_SCANS = frozenset({"mednext"})

#: Suffix of a trainer name -> mixer in the place of the network's own blocks.
MIXER_SUFFIXES = {f"_{spec.title}": name for name, spec in MIXERS.items()}

#: Suffixes of a trainer name, in the order in which they are combined. Other schedules are data in the plans.
CONTROLS = {
    "_Identity": "identity",
    "_DWConv": "dwconv",
    "_LTI": "lti",
    "_Shuffled": "shuffled",
    "_Windowed": "windowed",
}
FINETUNING = "_Finetune"
SHORT_SCHEDULES = {"_5epochs": 5, "_50epochs": 50, "_250epochs": 250}


@dataclass(frozen=True)
class TrainerVariant:
    """What the name of a trainer says.

    Attributes:
        network: registry name.
        mixer: registry name of the mixer that replaces the network's own blocks; None: as the plans say.
        ssm_mode: the control that replaces the scan; None: as the plans say.
        is_finetuning: the schedule of the plans, changed for weights that are not random.
        epochs: number of epochs; None: as the plans say.
    """

    network: str
    mixer: str | None = None
    ssm_mode: str | None = None
    is_finetuning: bool = False
    epochs: int | None = None


def house_name(network: str) -> str:
    """``vmunet`` -> ``VMUNet``; a network of a third party is written in camel case, ``cpu-student`` as CpuStudent."""
    parts = network.replace("-", "_").split("_")
    return HOUSE_NAMES.get(network) or "".join(part[:1].upper() + part[1:] for part in parts)


def trainer_name(network: str) -> str:
    """Name of the trainer for a network: ``vmunet`` -> ``nnUNetTrainerVMUNet``."""
    return f"nnUNetTrainer{house_name(network)}"


def _trainer_variants() -> dict[str, TrainerVariant]:
    variants = {}
    none: dict[str, str | None] = {"": None}
    for network in HOUSE_NAMES:
        has_scans = network not in WITHOUT_SCANS
        controls = {**none, **(CONTROLS if has_scans else {})}
        mixers = {**none, **(MIXER_SUFFIXES if has_scans else {})}
        suffixes = product(mixers, controls, ("", FINETUNING), ("", *SHORT_SCHEDULES))
        for mixer, control, finetuning, schedule in suffixes:
            variants[trainer_name(network) + mixer + control + finetuning + schedule] = TrainerVariant(
                network, mixers[mixer], controls[control], bool(finetuning), SHORT_SCHEDULES.get(schedule)
            )
    return variants


#: Every trainer that medmamba offers. ``trainers.TRAINERS`` makes the classes under the same names.
TRAINER_VARIANTS = _trainer_variants()

#: The same for readers, who would get lost in the full list.
TRAINER_NAMES_IN_WORDS = (
    f"{', '.join(map(trainer_name, HOUSE_NAMES))}; each may be followed by a mixer ({', '.join(MIXER_SUFFIXES)}) and "
    f"by one of {', '.join(CONTROLS)} (neither for {', '.join(map(trainer_name, sorted(WITHOUT_SCANS)))}), "
    f"by {FINETUNING} and by one of {', '.join(SHORT_SCHEDULES)}, in this order"
)


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
