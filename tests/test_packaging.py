"""What a build gives: a pure wheel without a compiler, an error when the native library is required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "medmamba", "kernels", "plans")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy2(path, folder / name)
    return folder


def build_without_compiler(sources: Path, wheels: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` on a machine whose compiler fails."""
    clean = {key: value for key, value in os.environ.items() if key not in ("MEDMAMBA_REQUIRE_NATIVE", "PIP_QUIET")}
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(wheels), str(sources)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env={**clean, "CC": "/bin/false", "CXX": "/bin/false", **environment},
        cwd=wheels.parent,
    )


def test_without_a_compiler_the_wheel_is_pure_and_says_so(sources, tmp_path):
    result = build_without_compiler(sources, tmp_path / "wheels")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "WITHOUT the native CPU scan" in result.stdout
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ("medmamba", "medmamba_kernels", "medmamba_plans"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "medmamba",
        "medmamba_kernels",
        "medmamba_plans",
    }
    assert "medmamba/demo/data/Dataset004_Hippocampus/LICENSE" in names
    assert sum(name.endswith(".nii.gz") for name in names) == 16


def test_a_required_native_library_that_does_not_build_is_an_error(sources, tmp_path):
    result = build_without_compiler(sources, tmp_path / "wheels", MEDMAMBA_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "CMake configuration failed" in result.stdout
