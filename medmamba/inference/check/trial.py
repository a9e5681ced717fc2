"""One pass of a network, to know what it costs on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from medmamba.inference.machine import peak_bytes, resident_bytes
from medmamba.inference.predictor.model_predictor import ModelPredictor, limit_threads


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        seconds: of one pass of one network over one tile, after another one to warm up.
        base_bytes: what the process holds with all libraries and one network; None if unknown.
        pass_bytes: the most that it held during the passes on top of that. The most since its start is taken for it,
            so that a process that did larger things before gets a larger number.
        threads: of torch.
    """

    seconds: float
    base_bytes: int | None
    pass_bytes: int
    threads: int


def trial_of(predictor: ModelPredictor) -> Trial:
    """Load the first network of a predictor, run it twice on one tile of noise, and time the second run.

    Raises:
        ModelRefused: the package has changed since it was checked.
    """
    # Part of what prediction holds: nnU-Net's preprocessing with its libraries.
    import nnunetv2.preprocessing.preprocessors.default_preprocessor
    import nnunetv2.utilities.plans_handling.plans_handler  # noqa: F401

    limit_threads()
    model = predictor.model
    network = model.network((predictor.folds or model.folds)[0]).to(predictor.device)
    size = (1, len(model.channel_names), *model.configuration["patch_size"])
    tile = torch.randn(size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        network(tile.to(predictor.device)).cpu()
        start = time.perf_counter()
        network(tile.to(predictor.device)).cpu()
        seconds = time.perf_counter() - start
    base, most = resident_bytes(), peak_bytes()
    held = 0 if base is None or most is None else max(0, most - base)
    return Trial(seconds, base, held, torch.get_num_threads())
