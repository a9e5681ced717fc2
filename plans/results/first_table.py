"""The first table: every network with its scan and without it, beside the stock network, on two datasets.

    python plans/results/first_table.py WORK_FOLDER RAW_DATASET_FOLDER... [--jobs 2]

What the arms share is said in :mod:`short_trainings`. Each folder is a dataset in nnU-Net's raw layout. Collect with::

    medmamba collect WORK_FOLDER/results/*/DatasetXXX_Name --out table.csv
"""

from __future__ import annotations

import sys

from short_trainings import STOCK, Arm, Table

from medmamba.networks import NETWORKS


def arms() -> list[Arm]:
    """The stock network, and every network of ours with its scan and without."""
    own = [
        Arm(name, mode)
        for name, spec in NETWORKS.items()
        for mode in (["scan", "identity"] if spec.has_scans else [""])
    ]
    return [Arm(STOCK), *own]


TABLE = Table(
    description="Train every arm of the first table.",
    script=__file__,
    arms=arms(),
    schedule={
        "epochs": 10,
        "iterations": 25,
        "val-iterations": 1,
        "warmup-epochs": 1,
        "optimizer": "AdamW",
        "lr": 3e-3,
    },
    # A CPU has no time for the planned ones of 101 (4 x 2.5 x 4 mm, 80x128x128); its labels are scored at their own
    # spacing all the same.
    settings={4: {"spacing": None, "patch": (40, 56, 40)}, 101: {"spacing": (5, 5, 5), "patch": (32, 48, 64)}},
)

if __name__ == "__main__":
    sys.exit(TABLE.main())
