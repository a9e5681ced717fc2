"""Model packages: a folder of safe files instead of nnU-Net's pickles, made by export and checked as a whole on load.

problems.py      the ids of all refusals, ModelRefused
package.py       the folder: names, checksums
values.py        checks of single values of a JSON file
labels.py        what the outputs mean
plans.py         the plans: what is kept, which parts of nnU-Net a file may name
architecture.py  the networks that a file may name, and how they are built
fingerprint.py, metrics.py   what the training images were like, how well it did
description.py   model.json, all of it
tensors.py       the safetensors of a fold
load.py          load_model, Model
run.py           a trained folder of nnU-Net
card.py, export.py           export_model, seal_card
convert.py        convert_model: a smaller copy of a package
"""

from __future__ import annotations

from .convert import convert_model
from .export import export_model, seal_card
from .labels import Labels
from .load import Model, load_model
from .problems import PROBLEMS, ModelRefused

__all__ = ["PROBLEMS", "Labels", "Model", "ModelRefused", "convert_model", "export_model", "load_model", "seal_card"]
