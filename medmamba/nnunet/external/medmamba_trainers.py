"""The one module that nnU-Net finds through ``nnUNet_extTrainer``: it re-exports medmamba's trainers.

nnU-Net imports every module of this folder, asks it for one name with ``hasattr`` and forgets the module
again. So the trainers live in :mod:`medmamba.nnunet.trainers`, whose classes keep their identity and can be
pickled, and are imported only when one of their names is asked for: searching for somebody else's trainer
never runs our code.
"""

from __future__ import annotations

from typing import Any

from medmamba.nnunet.names import TRAINER_NAMES_IN_WORDS, TRAINER_VARIANTS


def __getattr__(name: str) -> Any:
    if name not in TRAINER_VARIANTS:
        raise AttributeError(f"medmamba has no trainer {name!r}; known: {TRAINER_NAMES_IN_WORDS}")
    from medmamba.nnunet.trainers import TRAINERS

    return TRAINERS[name]
