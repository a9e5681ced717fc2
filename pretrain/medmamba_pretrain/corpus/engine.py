"""Running one function over many tasks: on this machine, or on the workers of a Dask cluster. joblib does both.

Results come in the order of the tasks, so that a run with many workers decides the same as a run with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import joblib

from medmamba.command import CommandError

ENGINES = ("joblib", "dask")

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Engine:
    """Where tasks run.

    Attributes:
        name: "joblib" (processes of this machine) or "dask".
        jobs: processes at a time; on a cluster tasks in flight are up to the cluster.
        scheduler: address of Dask's scheduler, e.g. "tcp://10.0.0.1:8786".
    """

    name: str = "joblib"
    jobs: int = 1
    scheduler: str | None = None

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """``function`` of every task, in order.

        Raises:
            CommandError: Dask is missing or its scheduler does not answer.
        """
        with self._backend() as backend:
            jobs = -1 if self.name == "dask" else self.jobs
            parallel = joblib.Parallel(n_jobs=jobs, backend=backend, return_as="generator", batch_size=1)
            yield from parallel(joblib.delayed(_quiet)(function, task) for task in tasks)

    @contextmanager
    def _backend(self) -> Iterator[str | None]:
        if self.name != "dask":
            yield "sequential" if self.jobs == 1 else "loky"
            return
        try:
            from dask.distributed import Client
        except ImportError as error:
            raise CommandError("--engine dask needs Dask; pip install 'medmamba[cluster]'") from error
        if self.scheduler is None:
            raise CommandError("--engine dask needs --scheduler ADDRESS, e.g. tcp://10.0.0.1:8786")
        try:
            client = Client(self.scheduler, timeout="20s")
        except (OSError, ValueError) as error:
            raise CommandError(f"no Dask scheduler answers at {self.scheduler} ({error}); start it first") from error
        with client, joblib.parallel_config(backend="dask"):
            yield None


def _quiet(function: Callable[[Task], Result], task: Task) -> Result:
    """One thread per process: the processes are as many as the cores."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return function(task)
