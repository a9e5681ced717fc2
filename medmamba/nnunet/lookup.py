"""Our trainers for nnU-Net's commands in this process and in its children.

nnU-Net looks a trainer up by importing everything it ships, and only then asks the folders in
``nnUNet_extTrainer``; one broken stock module (a torchvision that does not match torch is enough) hides every
trainer. Within :func:`trainers_resolvable` our names are answered first and directly. Child processes of a
multi-GPU training start afresh and find us through the variable, which is set as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from medmamba.nnunet.errors import UserFacingError
from medmamba.nnunet.names import EXT_TRAINER, TRAINER_NAMES_IN_WORDS, TRAINER_VARIANTS, ext_trainer_value

LOOKUP = "recursive_find_trainer_class_by_name"


class UnknownTrainerError(UserFacingError, LookupError):
    """No trainer of this name, neither ours nor nnU-Net's nor in ``nnUNet_extTrainer``."""


class BrokenLookupError(UserFacingError, RuntimeError):
    """nnU-Net cannot import its own trainers, so it cannot look any name up."""


def find_trainer(name: str, elsewhere: Callable[[str], type]) -> type:
    """A trainer class by name: ours directly, all others through nnU-Net's own look-up ``elsewhere``.

    Raises:
        UnknownTrainerError: nobody has this trainer; the text lists ours.
        BrokenLookupError: nnU-Net's look-up itself fails.
    """
    if name in TRAINER_VARIANTS:
        from medmamba.nnunet.trainers import TRAINERS

        return TRAINERS[name]
    try:
        return elsewhere(name)
    except (RuntimeError, ImportError) as error:
        if name in str(error):
            raise UnknownTrainerError(
                f"no trainer {name!r}; medmamba has {TRAINER_NAMES_IN_WORDS}; nnU-Net has nnUNetTrainer and its "
                "variants, and nnUNet_extTrainer may name folders with more"
            ) from error
        raise BrokenLookupError(
            f"nnU-Net cannot look up the trainer {name!r}, because importing its own trainers fails "
            f"({type(error).__name__}: {error}); `medmamba doctor` names the cause"
        ) from error


@contextmanager
def trainers_resolvable() -> Iterator[None]:
    """Within this context nnU-Net finds our trainers, in this process and in its children."""
    from nnunetv2.utilities import find_objects

    original = getattr(find_objects, LOOKUP)

    def lookup(trainer_name: str) -> type:
        return find_trainer(trainer_name, original)

    variable = os.environ.get(EXT_TRAINER)
    os.environ[EXT_TRAINER] = ext_trainer_value()
    # Modules imported from here on pick up the new function by themselves; the last step cleans them as well.
    _replace(original, lookup)
    try:
        yield
    finally:
        _replace(lookup, original)
        if variable is None:
            del os.environ[EXT_TRAINER]
        else:
            os.environ[EXT_TRAINER] = variable


def _replace(old: Callable[[str], type], new: Callable[[str], type]) -> None:
    """Exchange the look-up in every module of nnU-Net that holds it under its own name."""
    holders: list[ModuleType] = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("nnunetv2.") and vars(module).get(LOOKUP) is old
    ]
    for module in holders:
        setattr(module, LOOKUP, new)
