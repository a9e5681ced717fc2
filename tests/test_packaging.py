"""What a build gives: a wheel with the native library, also offline; a pure one without a compiler, or an error.

The builds are slow; what cibuildwheel is told is read here and not run.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from medmamba_kernels.backends import native

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCES = (
    *("pyproject.toml", ".gitignore", "README.md", "LICENSE", "CMakeLists.txt"),
    *("medmamba", "kernels", "plans", "pretrain", "tests/data/models"),
)


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


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_and_says_so(sources, tmp_path):
    result = build_without_compiler(sources, tmp_path / "wheels")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "WITHOUT the native CPU scan" in result.stdout
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ("medmamba", "medmamba_kernels", "medmamba_plans", "medmamba_pretrain"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "medmamba",
        "medmamba_kernels",
        "medmamba_plans",
        "medmamba_pretrain",
    }
    assert "medmamba/demo/data/Dataset004_Hippocampus/LICENSE" in names
    assert "medmamba/diagnostics/memory_model.json" in names
    assert sum(name.endswith(".nii.gz") for name in names) == 16


@pytest.mark.slow
def test_a_required_native_library_that_does_not_build_is_an_error(sources, tmp_path):
    result = build_without_compiler(sources, tmp_path / "wheels", MEDMAMBA_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "CMake configuration failed" in result.stdout


# --- with a compiler ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that holds what a build needs and, for the scan, the torch of this one."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("builder")
    call(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    requirements = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["build-system"]["requires"]
    call(python, "-m", "pip", "install", "--quiet", "build", "cmake", "ninja", *requirements)
    # The search path alone: the finders that another editable installation hides there are not run.
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python


def call(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Output of a child that knows nothing of this installation; its end is the message if it fails."""
    ours = ("MEDMAMBA_NATIVE_LIBRARY", "PYTHONPATH", "PIP_QUIET")
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env={**clean, **environment},
        cwd=cwd,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def without_network() -> list[str]:
    """Prefix of a command that cuts the network off, where this machine lets us."""
    prefix = ["unshare", "--net", "--map-root-user"]
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []
    except OSError:
        return []


@pytest.fixture(scope="module")
def offline_wheel(sources: Path, builder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that an sdist becomes without network."""
    folder = tmp_path_factory.mktemp("wheels")
    call(builder, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, sources)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [builder, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder]
    call(*without_network(), *pip, sdist, MEDMAMBA_REQUIRE_NATIVE="1")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_an_sdist_becomes_a_wheel_for_every_python_offline(offline_wheel):
    assert "-py3-none-" in offline_wheel.name
    assert not offline_wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(offline_wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith((".so", ".dylib", ".dll"))]
        assert [Path(name).parent.name for name in libraries] == ["medmamba_kernels"]
        assert Path(libraries[0]).name in native.LIBRARY_NAMES
        library = archive.extract(libraries[0], offline_wheel.parent / "unpacked")
    assert ctypes.CDLL(library).medmamba_abi_version() == native.ABI_VERSION
    if shutil.which("readelf") and sys.platform == "linux":
        needed = call("readelf", "--dynamic", "--wide", library)
        assert "libc.so" in needed
        assert "libstdc++" not in needed
        assert "libgcc_s" not in needed


@pytest.mark.slow
def test_the_trained_model_is_in_the_sdist_and_not_in_the_wheel(offline_wheel):
    (sdist,) = offline_wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    model = CHECKOUT / "tests" / "data" / "models" / "hippocampus"
    assert {path.relative_to(CHECKOUT).as_posix() for path in model.iterdir()} <= set(names)
    with zipfile.ZipFile(offline_wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".safetensors")]


@pytest.mark.slow
def test_the_wheel_alone_passes_the_check_that_cibuildwheel_runs(offline_wheel, builder, tmp_path):
    call(builder, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", offline_wheel)
    output = call(builder, CHECKOUT / "tools" / "check_wheel.py", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert f"library: {tmp_path / 'site'}" in output
    assert "values and gradients agree" in output


@pytest.mark.slow
def test_the_wheel_changes_nothing_that_is_installed_already(offline_wheel, tmp_path):
    """pip's own answer: beside torch and nnU-Net it installs medmamba and nothing else."""
    report = tmp_path / "report.json"
    call(sys.executable, "-m", "pip", "install", "--dry-run", "--report", report, offline_wheel)
    names = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
    # Old packages want argparse, which pip never counts as installed: it is in Python.
    assert names <= {"medmamba", "argparse"}


@pytest.mark.nightly  # builds what the sdist built, for the way of people who work on medmamba
def test_an_editable_installation_finds_the_library(sources, builder, tmp_path):
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--editable"]
    call(builder, "-m", "pip", "install", *options, sources, MEDMAMBA_REQUIRE_NATIVE="1")
    output = call(builder, CHECKOUT / "tools" / "check_wheel.py", cwd=tmp_path)
    assert str(sources / "kernels" / "medmamba_kernels") in output
    assert "values and gradients agree" in output


# --- cibuildwheel ---------------------------------------------------------------------------------------------------

PLATFORMS = {"manylinux_x86_64", "manylinux_aarch64", "macosx_arm64", "win_amd64"}
# Of its documentation, those that we use: a mistyped one would be an error on somebody's build machine only.
OPTIONS = {
    "before-test",
    "build",
    "build-frontend",
    "environment",
    "manylinux-aarch64-image",
    "manylinux-x86_64-image",
    "test-command",
    "test-environment",
}


def wheel_settings() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    return settings


def test_one_wheel_is_built_per_platform():
    settings = wheel_settings()
    assert {build.partition("-")[2] for build in settings["build"]} == PLATFORMS
    assert len({build.partition("-")[0] for build in settings["build"]}) == 1
    assert len(settings["build"]) == len(PLATFORMS)
    assert {settings[f"manylinux-{machine}-image"] for machine in ("x86_64", "aarch64")} == {"manylinux_2_28"}


def test_every_wheel_has_the_library_or_is_an_error_and_is_checked():
    settings = wheel_settings()
    sections = {name: value for name, value in settings.items() if name in ("linux", "macos", "windows")}
    assert set(settings) - set(sections) <= OPTIONS
    for section in (settings, *sections.values()):
        assert set(section) - set(sections) <= OPTIONS
        # A section replaces the environment of all platforms.
        assert section["environment"]["MEDMAMBA_REQUIRE_NATIVE"] == "1"
    program = settings["test-command"].split()[1]
    assert (CHECKOUT / program.removeprefix("{project}/")).is_file()
    assert settings["test-environment"] == {"PIP_NO_DEPS": "1"}
    assert "--isolated" in settings["before-test"]
