"""Every mixer in one network, after the same few iterations, with its controls, on Dataset004.

    python plans/results/mixers.py WORK_FOLDER RAW_FOLDER_OF_DATASET004 [--jobs 2]

The network is ``vmunet`` in its small variant, whose own blocks, identity and depthwise control are arms as well, and
the stock network. What the arms share is said in :mod:`short_trainings`. Collect with::

    medmamba collect WORK_FOLDER/results/*/Dataset004_Hippocampus --out mixers.csv --paired mixers_paired.csv
"""

from __future__ import annotations

import sys

from short_trainings import STOCK, Arm, Table

from medmamba.presets import MIXERS

HOST = "vmunet"

TABLE = Table(
    description="Train a small network with every mixer.",
    script=__file__,
    arms=[
        Arm(STOCK),
        *(Arm(HOST, mode) for mode in ("scan", "identity", "dwconv")),
        *(Arm(HOST, "scan", mixer) for mixer in MIXERS),
    ],
    schedule={"epochs": 6, "iterations": 20, "val-iterations": 1, "warmup-epochs": 1, "optimizer": "AdamW", "lr": 3e-3},
    settings={4: {"spacing": None, "patch": (40, 56, 40)}},
)

if __name__ == "__main__":
    sys.exit(TABLE.main())
