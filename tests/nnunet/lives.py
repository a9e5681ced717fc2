"""Lives of a training, for tests that end them: stock ``nnUNetv2_train`` in processes that start quickly.

    python lives.py LOG ARGUMENTS OF nnUNetv2_train ...

imports nnU-Net once. For every line that it reads, environment variables as JSON, it forks a process that runs the
entry point of nnU-Net and prints to LOG; it prints the number of that process, waits for it, and prints its exit code
(negative: killed by that signal). Other processes that nnU-Net would start are threads, its drawing of curves is left
out, and tiles of a validation neither overlap nor are mirrored.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock

import medmamba.nnunet.trainers  # noqa: F401 (so that no life has to import it)


def quick_predictor(**options: Any) -> nnUNetPredictor:
    return nnUNetPredictor(**{**options, "tile_step_size": 1.0, "use_mirroring": False})


def live(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    LocalLogger.plot_progress_png = lambda *_: None
    stock.nnUNetPredictor = quick_predictor
    multiprocessing.get_context = lambda method=None: SimpleNamespace(Pool=ThreadPool)
    code = 1
    try:
        run_training_entry()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    log_file = sys.argv.pop(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            live(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
