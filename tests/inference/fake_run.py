"""A folder run with a predictor that thresholds: for tests in this process and in others.

As a program: ``fake_run.py INPUTS OUTPUT PAUSE`` runs once; ``fake_run.py --serve`` reads such lines (as JSON lists,
with a number of steps after which the process kills itself, or null) and runs each in a fork of itself, which takes
milliseconds where a new Python takes seconds. It prints the process id, and the exit status once that has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import nibabel  # noqa: F401 -- so that a fork does not load it again
import numpy as np

from medmamba.inference.folder import Options, run_folder
from medmamba.inference.protocol import Prediction
from medmamba.inference.reading import Image
from medmamba.stop import Stopped

STEPS = {"open", "os.rename", "os.remove", "os.chmod", "os.truncate", "os.mkdir"}


@dataclass
class Threshold:
    """Predicts 1 where the mean of all channels is above 50.

    Attributes:
        pause_s: how long it takes.
        predicted: how many cases it was asked about.
    """

    id: str = "threshold-1"
    labels: Mapping[int, str] = field(default_factory=lambda: {0: "background", 1: "bright", 2: "never there"})
    channel_names: Sequence[str] = ("CT",)
    pause_s: float = 0.0
    predicted: int = 0

    def predict(self, channels: Sequence[Image], *, should_stop: Callable[[], bool]) -> Prediction:
        self.predicted += 1
        end = time.monotonic() + self.pause_s
        while time.monotonic() < end:
            if should_stop():
                raise Stopped
            time.sleep(0.01)
        values = np.mean([image.values for image in channels], axis=0)
        return Prediction((values > 50).astype(np.uint8), {"tiles": 1})


def kill_myself_at(step: int, folder: str) -> None:
    """End this process with SIGKILL when it does something with files of ``folder`` for the ``step``-th time."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in STEPS and any(folder in os.fsdecode(word) for word in arguments if isinstance(word, str | bytes)):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def serve() -> None:
    for line in sys.stdin:
        inputs, output, step = json.loads(line)
        pid = os.fork()
        if pid == 0:
            if step is not None:
                kill_myself_at(step, output)
            os._exit(run_folder(inputs, output, Threshold(), Options(say=lambda line: None)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    else:
        sys.exit(run_folder(sys.argv[1], sys.argv[2], Threshold(pause_s=float(sys.argv[3]))))
