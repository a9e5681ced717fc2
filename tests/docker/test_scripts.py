"""The scripts around the images, with stand-ins for ``medmamba`` and ``docker`` that write down what they get."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parents[2] / "docker"
#: What a careful hospital runs an image with.
HARDENING = [
    "--network none",
    "--read-only",
    "--cap-drop ALL",
    "--security-opt no-new-privileges",
    "--shm-size 64k",
    "--pids-limit 256",
    "--memory 4g",
]

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Runs a script of docker/ with a program of this name and content first in PATH."""

    def run(script: str, *arguments: str | Path, program: str, content: str, **variables: str | Path):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / program).write_text(f"#!/bin/sh\n{content}\n")
        (folder / program).chmod(0o755)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MEDMAMBA_", "DOCKER"))}
        return subprocess.run(
            [DOCKER / script, *map(str, arguments)],
            env={**clean, "PATH": f"{folder}:{os.environ['PATH']}", **{k: str(v) for k, v in variables.items()}},
            capture_output=True,
            text=True,
        )

    return run


# --- predict.sh -----------------------------------------------------------------------------------------------------


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """Root of a container's folders, with one model."""
    root = tmp_path / "root"
    for name in ("input", "output", "models/liver", "workspace/inputs", "workspace/outputs"):
        (root / name).mkdir(parents=True)
    (root / "models" / "liver" / "model.json").write_text("{}")
    return root


@pytest.fixture
def predict(call: Call, container: Path) -> Call:
    def run(*arguments: str, content: str = 'echo "$@"', **variables: str | Path):
        return call("predict.sh", *arguments, program="medmamba", content=content, MEDMAMBA_ROOT=container, **variables)

    return run


def test_without_arguments_the_only_model_predicts_the_input(predict, container):
    done = predict()
    expected = f"predict -i {container}/input -o {container}/output -m {container}/models/liver\n"
    assert (done.returncode, done.stdout) == (0, expected)


def test_images_of_a_workspace_go_before(predict, container):
    (container / "workspace" / "inputs" / "a.nii.gz").touch()
    expected = f"predict -i {container}/workspace/inputs -o {container}/workspace/outputs -m {container}/models/liver\n"
    assert predict().stdout == expected


def test_models_may_be_the_model_itself(predict, container):
    (container / "models" / "liver" / "model.json").rename(container / "models" / "model.json")
    assert predict().stdout.endswith(f" -m {container}/models/model.json\n".replace("/model.json", ""))


def test_variables_and_arguments_say_otherwise(predict, container, tmp_path):
    done = predict(
        "--format", ".mha", MEDMAMBA_INPUT=container, MEDMAMBA_OUTPUT=tmp_path / "out", MEDMAMBA_MODEL="/elsewhere"
    )
    assert done.stdout == f"predict -i {container} -o {tmp_path}/out -m /elsewhere --format .mha\n"


def test_no_model_is_wrong_usage(predict, container):
    (container / "models" / "liver" / "model.json").unlink()
    done = predict()
    assert done.returncode == 2
    assert done.stdout == "predict.sh: no model package in /models; mount one there read-only, or set MEDMAMBA_MODEL\n"


def test_two_models_are_wrong_usage_and_named(predict, container):
    (container / "models" / "lung").mkdir()
    (container / "models" / "lung" / "model.json").write_text("{}")
    done = predict()
    assert done.returncode == 2
    assert "2 model packages" in done.stdout
    assert f"{container}/models/liver {container}/models/lung" in done.stdout


def test_a_missing_input_is_wrong_usage(predict, container):
    (container / "input").rmdir()
    done = predict()
    assert done.returncode == 2
    assert "mount the images there" in done.stdout


def test_the_exit_code_is_that_of_the_prediction_and_stderr_stays_empty(predict):
    done = predict(content="echo notes >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "notes\n", "")


# --- test-image.sh --------------------------------------------------------------------------------------------------

ALL_WELL = 'echo "$@" >> "$CALLS"'


@pytest.fixture
def check(call: Call, tmp_path: Path) -> Call:
    (tmp_path / "model").mkdir()
    (tmp_path / "images").mkdir()

    def run(content: str):
        arguments = ("medmamba:cpu", tmp_path / "model", tmp_path / "images")
        return call("test-image.sh", *arguments, program="docker", content=content, CALLS=tmp_path / "calls")

    return run


def test_every_container_is_run_with_all_restrictions(check, tmp_path):
    check(ALL_WELL)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 6
    for words in calls:
        assert [option for option in HARDENING if option not in words] == []
        assert f"{tmp_path}/images:/input:ro" in words
        assert re.search(r"--user ([1-9]\d{4}):\1 ", words)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_image_that_works_passes(check):
    # Under --user the results belong to that user; the stand-in does what the container would.
    done = check("""
        for word; do case $word in [0-9]*:[0-9]*) user=$word;; *:/output) out=${word%:/output};; esac; done
        touch "$out/seg.nii.gz" && chown "$user" "$out/seg.nii.gz"
    """)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.endswith("everything works\n")


@pytest.mark.parametrize("command", ["doctor", "check", "predict"])
def test_an_image_in_which_one_command_fails_does_not_pass(check, command):
    done = check(f'case " $* " in *" {command} "*) echo the reason; exit 9;; esac')
    assert done.returncode == 1
    assert "FAILED: 9 instead of 0" in done.stdout
    assert "    the reason\n" in done.stdout


def test_results_of_another_user_do_not_pass(check):
    done = check('for word; do case $word in *:/output) touch "${word%:/output}/seg.nii.gz";; esac; done')
    assert done.returncode == 1
    assert "the results belong to user" in done.stdout


@pytest.mark.parametrize("script", ["test-image.sh", "sbom.sh"])
def test_wrong_usage_is_explained(script, call):
    done = call(script, program="docker", content="exit 0")
    assert done.returncode == 2
    assert f"docker/{script} IMAGE" in done.stderr
