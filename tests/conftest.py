"""Settings of all tests: which installation is under test, and what a missing GPU means."""

from __future__ import annotations

import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("medmamba", "medmamba_kernels", "medmamba_plans", "medmamba_pretrain")

# A slow machine is no broken law: hypothesis would fail an example that takes longer than 0.2 s.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Children of a test must not find half of the packages in the folder they are started in (see `mixture`).
os.environ.setdefault("PYTHONSAFEPATH", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Every worker is a process of its own: more threads than cores make all of them slow.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def package_locations() -> dict[str, Path]:
    """Folder of every package of the distribution; UsageError when one is not installed."""
    locations = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise pytest.UsageError(f"{name} is not installed; run `pip install .` or `pip install -e .` first")
        # Not the search path: an editable install also lists site-packages there, for the native library.
        locations[name] = Path(spec.origin).resolve().parent
    return locations


def mixture(locations: dict[str, Path], checkout: Path) -> str | None:
    """What is wrong with these locations: None when all packages belong to one installation."""
    inside = {name for name, path in locations.items() if path.is_relative_to(checkout)}
    if inside == set(locations):
        return None
    if inside:
        return "packages of this checkout and of another installation are mixed"
    if len({path.parent for path in locations.values()}) > 1:
        return "packages come from another checkout or from more than one installation"
    return None


def pytest_configure(config: pytest.Config) -> None:
    locations = package_locations()
    problem = mixture(locations, CHECKOUT)
    if problem:
        where = ", ".join(f"{name}: {path}" for name, path in locations.items())
        raise pytest.UsageError(
            f"{problem} ({where}); start `pytest` instead of `python -m pytest`, or `pip install -e .` this checkout"
        )


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"{name}: {path}" for name, path in package_locations().items()]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("MEDMAMBA_REQUIRE_GPU") == "1":
        pytest.fail("MEDMAMBA_REQUIRE_GPU=1 and torch sees no CUDA device", pytrace=False)
    pytest.skip("torch sees no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Pages that are slow come first: one takes as long as half of the other slow tests, which then run beside it."""
    items.sort(key=lambda item: "test_docs.py" not in item.nodeid or item.get_closest_marker("slow") is None)


@pytest.fixture
def add_distribution(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``add_distribution(name, entry_points, **modules)``: as if pip had installed it; returns its folder."""

    def add(name: str, entry_points: str, **modules: str) -> Path:
        folder = tmp_path_factory.mktemp("site")
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(textwrap.dedent(source))
            monkeypatch.delitem(sys.modules, module, raising=False)
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        monkeypatch.syspath_prepend(folder)
        return folder

    return add
