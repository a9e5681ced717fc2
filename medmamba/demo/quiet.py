"""nnU-Net in this process only: its own code, without child processes, console noise or a prepared environment.

nnU-Net 2.8 opens a ``spawn`` pool for fingerprint and preprocessing. Every child imports torch and nnunetv2 again (6
CPU seconds and 0.5 GB each), and a script without ``if __name__ == "__main__"`` respawns for ever. For eight
small volumes the work itself takes less than a second, so the pools are replaced by a loop.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

#: Modules of nnU-Net that open a pool while they plan and preprocess, and the name under which they find it.
_POOLS = {
    "nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor": "multiprocessing",
    "nnunetv2.preprocessing.preprocessors.default_preprocessor": "multiprocessing",
    "nnunetv2.utilities.utils": "Pool",
}


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore what was there at the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append everything that is printed to a file. Exceptions pass."""
    with (
        log.open("a", encoding="utf-8", buffering=1) as stream,
        redirect_stdout(stream),
        redirect_stderr(stream),
    ):
        yield


@contextmanager
def without_child_processes() -> Iterator[None]:
    """Let nnU-Net's planning and preprocessing run their pools as plain loops."""
    with ExitStack() as stack:
        for module, name in _POOLS.items():
            replacement = InlinePool if name == "Pool" else _InlineMultiprocessing
            stack.enter_context(_replaced(importlib.import_module(module), name, replacement))
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    # getattr raises when a new nnU-Net no longer has the name: better than children nobody asked for.
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class InlinePool:
    """The part of ``multiprocessing.Pool`` that nnU-Net uses; work is done when it is handed in."""

    def __init__(self, processes: int | None = None) -> None:
        # nnU-Net asks this list whether its workers are alive.
        self._pool: list[Any] = []

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def starmap(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        return [function(*each) for each in arguments]

    def starmap_async(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> _Done:
        return _Done(self.starmap(function, arguments))


class _Done:
    def __init__(self, value: Any) -> None:
        self._value = value

    def ready(self) -> bool:
        return True

    def get(self, timeout: float | None = None) -> Any:
        return self._value


class _InlineMultiprocessing:
    @staticmethod
    def get_context(method: str) -> type[_InlineMultiprocessing]:
        return _InlineMultiprocessing

    Pool = InlinePool
