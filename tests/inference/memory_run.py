"""Predicts one case in a process of its own, and says what it held, in MiB: foretold and measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from medmamba.inference.check import Case
from medmamba.inference.check.case_report import describe
from medmamba.inference.check.estimate import Estimate
from medmamba.inference.check.trial import trial_of
from medmamba.inference.machine import peak_bytes
from medmamba.inference.model import load_model
from medmamba.inference.predictor.model_predictor import ModelPredictor
from medmamba.inference.reading import Image

MODEL, SHAPE, SPACING, COLUMNS = sys.argv[1], *map(json.loads, sys.argv[2:5])

predictor = ModelPredictor(load_model(MODEL), step=1.0, mirrors=False)
trial = trial_of(predictor)
values = np.random.default_rng(0).integers(1, 1000, SHAPE, dtype=np.int16)
image = Image(values, np.diag([*SPACING[::-1], 1.0])[:, [*COLUMNS, 3]])
report = describe(Case("a", (Path("a.nii"),)), [image])
predicted = Estimate(predictor, trial).cost(report).peak_ram_mb
before = peak_bytes()
predictor.predict([image], should_stop=lambda: False)
print(
    json.dumps(
        {"predicted": predicted, "measured": peak_bytes() >> 20, "before": before >> 20, "base": trial.base_bytes >> 20}
    )
)
