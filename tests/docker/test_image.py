"""The CPU image as built: what is in it, and that it predicts where next to nothing is allowed.

    pytest -m container tests/docker/test_image.py

Root, buildah, podman and runc are needed, and a network for the build; the containers have none. See conftest.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

CHECKOUT = Path(__file__).resolve().parents[2]
DEMO = CHECKOUT / "medmamba" / "demo" / "data" / "Dataset004_Hippocampus" / "imagesTr"
ODD_IMAGES = CHECKOUT / "tests" / "data" / "odd_images"
GOLDEN = CHECKOUT / "tests" / "data" / "segmentations" / "balanced"  # without mirroring, as PREDICT is
MRIS = [DEMO / f"hippocampus_{number}_0000.nii.gz" for number in ("148", "149")]
MORE_MRIS = [DEMO / f"hippocampus_{number}_0000.nii.gz" for number in ("160", "221")]

pytestmark = pytest.mark.container


# --- what is in it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspected(podman) -> dict:
    return json.loads(podman("image", "inspect", podman.image).stdout)[0]


def test_the_image_is_smaller_than_2_gb(inspected):
    assert inspected["Size"] < 2e9


def test_it_says_what_it_is_and_runs_as_nobody_in_particular(inspected):
    settings = inspected["Config"]
    assert settings["User"] == "10001:10001"
    assert settings["Entrypoint"] == ["medmamba"]
    assert settings["Cmd"] == ["--help"]
    assert settings.get("Healthcheck", {"Test": ["NONE"]}) == {"Test": ["NONE"]}
    prefix = "org.opencontainers.image."
    labels = {name.removeprefix(prefix): value for name, value in settings["Labels"].items() if prefix in name}
    assert labels["title"] == "medmamba"
    assert labels["base.name"].startswith("python:3.11")
    assert set(labels) >= {"version", "revision", "created", "source", "licenses", "description", "base.digest"}


def python(podman, code: str) -> str:
    done = podman.run("-c", code, entrypoint="python")
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_it_holds_the_locked_versions_and_nothing_else(podman):
    code = (
        "from importlib.metadata import distributions\n"
        "for d in distributions(): print(d.metadata['Name'].lower().replace('_', '-') + '==' + d.version)"
    )
    held = {line for line in python(podman, code).splitlines() if not line.startswith("medmamba==")}
    lines = (CHECKOUT / "docker" / "constraints-cpu.txt").read_text().splitlines()
    assert held == {line for line in lines if not line.startswith("#")}


def test_it_has_no_compiler_no_pip_and_no_cuda(podman):
    found = podman.run("-c", "command -v cc gcc c++ g++ clang make pip pip3; true", entrypoint="sh")
    assert found.stdout == ""
    assert python(podman, "import torch; print(torch.version.cuda, torch.version.hip)") == "None None\n"


def test_all_bytecode_is_there(podman):
    """A module without it is compiled at every start, because nothing can be written."""
    code = (
        "import sys, pathlib, medmamba.cli, medmamba.inference.predictor, medmamba.inference.folder\n"
        "import nnunetv2.utilities.plans_handling.plans_handler, SimpleITK, nibabel, scipy.ndimage\n"
        "paths = [m.__spec__.cached for m in list(sys.modules.values()) if getattr(m, '__spec__', None)]\n"
        "paths = [path for path in paths if path and path.endswith('.pyc')]\n"
        "print(len(paths) > 500, [path for path in paths if not pathlib.Path(path).exists()])"
    )
    assert python(podman, code) == "True []\n"


# --- commands -------------------------------------------------------------------------------------------------------


def test_without_a_command_it_explains_itself(podman, user):
    done = podman.run(user=user)
    assert done.returncode == 0
    assert "usage: medmamba" in done.stdout
    assert "not a medical device" in done.stdout


def test_doctor_passes_with_the_native_scan(podman, user):
    done = podman.run("doctor", user=user)
    assert done.returncode == 0, done.stdout
    assert "scan on cpu                     uses native" in done.stdout
    assert "all required checks passed" in done.stdout


def test_info_checks_a_mounted_model(podman, user, model):
    done = podman.run("info", "/models/hippocampus", mounts={model: "/models/hippocampus:ro"}, user=user)
    assert done.returncode == 0, done.stdout
    assert "Anterior" in done.stdout


def test_check_reads_real_images_and_refuses_bad_ones(podman, user):
    done = podman.run("check", "/input", mounts={DEMO: "/input:ro"}, user=user)
    assert done.returncode == 0, done.stdout
    done = podman.run("check", "/input", mounts={ODD_IMAGES: "/input:ro"}, user=user)
    assert done.returncode == 3, done.stdout
    assert "MM-IO-" in done.stdout


# --- prediction -----------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path: Path, user: int) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    os.chown(folder, user, user)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in MRIS:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def places(images: Path, output: Path, model: Path) -> dict[Path, str]:
    """What is mounted where."""
    return {images: "/input:ro", output: "/output", model: "/models/hippocampus:ro"}


PREDICT = ("predict", "-i", "/input", "-o", "/output", "-m", "/models/hippocampus", "--no-mirroring")


def final(output: Path) -> list[str]:
    """Names of all results."""
    return sorted(path.name for path in output.iterdir() if path.name.endswith((".nii.gz", ".mha")))


def test_real_mris_are_predicted_for_any_user_without_network_or_rights(podman, places, images, output, user):
    done = podman.run(*PREDICT, mounts=places, user=user)
    assert done.returncode == 0, done.stdout
    assert len(final(output)) == len(MRIS)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in output.rglob("*")} == {(user, user)}
    for path in MRIS:
        image = nibabel.load(path)
        (result,) = [nibabel.load(output / name) for name in final(output) if path.name[:15] in name]
        assert result.shape == image.shape
        for form in ("get_sform", "get_qform"):
            matrices = [getattr(volume.header, form)(coded=True) for volume in (image, result)]
            assert matrices[0][1] == matrices[1][1]
            assert np.array_equal(matrices[0][0], matrices[1][0])
        golden = nibabel.load(GOLDEN / f"{path.name[:15]}.nii.gz")
        assert np.array_equal(np.asarray(result.dataobj), np.asarray(golden.dataobj))


def test_a_second_run_keeps_what_the_first_made(podman, places, output, user):
    assert podman.run(*PREDICT, mounts=places, user=user).returncode == 0
    before = {name: (output / name).stat().st_mtime_ns for name in final(output)}
    assert podman.run(*PREDICT, mounts=places, user=user).returncode == 0
    assert {name: (output / name).stat().st_mtime_ns for name in final(output)} == before


def test_one_junk_file_of_five_is_reported_and_the_others_are_done(podman, places, images, output, user):
    for path in MORE_MRIS:
        shutil.copy(path, images)
    (images / "junk_0000.nii.gz").write_bytes(b"this is no image at all" * 20)
    done = podman.run(*PREDICT, mounts=places, user=user)
    assert done.returncode == 3, done.stdout
    assert len(final(output)) == 4
    assert "junk" in (output / "report.jsonl").read_text()


def test_two_parts_do_the_folder_together(podman, places, output, user):
    for part in ("0", "1"):
        done = podman.run(*PREDICT, "--num-parts", "2", "--part-id", part, mounts=places, user=user)
        assert done.returncode == 0, done.stdout
    assert len(final(output)) == len(MRIS)


def test_an_output_that_cannot_be_written_is_said_in_one_line(podman, places, output, user):
    done = podman.run(*PREDICT, mounts={**places, output: "/output:ro"}, user=user)
    assert done.returncode not in (0, 137)
    assert "Traceback" not in done.stdout
    assert "/output" in done.stdout.splitlines()[-1]


@pytest.fixture
def long_run(podman, tmp_path, output, model, user) -> Iterator[str]:
    """Name of a container that predicts a volume for minutes."""
    folder = tmp_path / "large"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 1000, (256, 256, 256)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "large_0000.nii.gz")
    name = f"medmamba-test-{os.getpid()}"
    mounts = {folder: "/input:ro", output: "/output", model: "/models/hippocampus:ro"}
    started = podman.run(*PREDICT, mounts=mounts, user=user, options=("--detach", "--name", name))
    assert started.returncode == 0, started.stdout
    deadline = time.monotonic() + 200
    while '"begin"' not in ((output / "report.jsonl").read_text() if (output / "report.jsonl").exists() else ""):
        assert time.monotonic() < deadline, podman("logs", name).stdout
        time.sleep(0.5)
    yield name
    podman("rm", "--force", name)


def state(podman, name: str) -> dict:
    return json.loads(podman("inspect", name).stdout)[0]["State"]


def test_a_stop_ends_with_75_before_the_kill_and_leaves_no_half_result(podman, long_run, output):
    """podman sends SIGKILL after the ten seconds, and the exit code would be 137."""
    podman("stop", "--time", "10", long_run)
    assert state(podman, long_run)["ExitCode"] == 75, podman("logs", long_run).stdout
    assert final(output) == []


def test_too_little_memory_is_exit_code_137_and_no_result(podman, places, output, user):
    done = podman.run(*PREDICT, mounts=places, user=user, memory="150m")
    assert done.returncode == 137, done.stdout
    assert final(output) == []


# --- challenges -----------------------------------------------------------------------------------------------------


def test_metaimages_are_predicted_without_arguments_as_grand_challenge_does(podman, places, images, output, user):
    for path in list(images.iterdir()):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(path).replace(".nii.gz", ".mha"))
        path.unlink()
    done = podman.run(mounts=places, user=user, entrypoint="/workspace/predict.sh")
    assert done.returncode == 0, done.stdout
    assert len(final(output)) == len(MRIS)
    for path in images.iterdir():
        image = SimpleITK.ReadImage(str(path))
        (result,) = [SimpleITK.ReadImage(str(output / name)) for name in final(output) if path.name[:15] in name]
        assert result.GetSize() == image.GetSize()
        for fact in ("GetOrigin", "GetSpacing", "GetDirection"):
            assert np.allclose(getattr(result, fact)(), getattr(image, fact)(), atol=1e-6)


def test_a_workspace_is_predicted_as_flare_does(podman, images, output, model, user):
    mounts = {images: "/workspace/inputs:ro", output: "/workspace/outputs", model: "/models/hippocampus:ro"}
    done = podman.run("-c", "sh predict.sh", mounts=mounts, user=user, entrypoint="/bin/bash")
    assert done.returncode == 0, done.stdout
    assert len(final(output)) == len(MRIS)


@pytest.mark.parametrize(
    ("target", "inputs", "outputs", "command"),
    [
        ("grand-challenge", "/input", "/output", ()),
        ("flare", "/workspace/inputs", "/workspace/outputs", ("/bin/bash", "-c", "sh predict.sh")),
    ],
)
def test_an_image_with_a_model_inside_runs_as_a_challenge_runs_it(
    target, inputs, outputs, command, podman, images, tmp_path, model
):
    name = f"localhost/medmamba-challenge:{target}"
    options = [
        "--pull-never",
        "--format=docker",
        "--isolation=chroot",
        f"--file={CHECKOUT}/docker/challenge.Dockerfile",
    ]
    built = podman("build", *options, f"--build-arg=IMAGE={podman.image}", f"--target={target}", f"--tag={name}", model)
    assert built.returncode == 0, built.stdout
    output = tmp_path / "made-by-root"
    output.mkdir()
    output.chmod(0o777 if target == "grand-challenge" else 0o755)
    mounts = ["--volume", f"{images}:{inputs}", "--volume", f"{output}:{outputs}"]
    done = podman("run", "--rm", "--no-healthcheck", "--network", "none", *mounts, name, *command)
    podman("image", "rm", name)
    assert done.returncode == 0, done.stdout
    assert len(final(output)) == len(MRIS)


# --- scripts --------------------------------------------------------------------------------------------------------


def script(podman, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CHECKOUT / "docker" / name, *map(str, arguments)],
        env={**os.environ, "DOCKER": "podman", "CONTAINERS_CONF": str(podman.configuration)},
        cwd=podman.configuration.parent,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_the_script_for_people_passes(podman, images, model):
    (images / MRIS[0].name).unlink()  # one will do: it is predicted with all reflections
    done = script(podman, "test-image.sh", podman.image, model, images)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything works" in done.stdout


def test_the_script_for_people_fails_on_junk(podman, tmp_path, model):
    (tmp_path / "junk_0000.nii.gz").write_bytes(b"no image")
    done = script(podman, "test-image.sh", podman.image, model, tmp_path)
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_the_parts_list_names_every_package(podman, tmp_path):
    if shutil.which("cyclonedx-py") is None:
        pytest.skip("cyclonedx-py is not installed (pip install cyclonedx-bom)")
    done = script(podman, "sbom.sh", podman.image, tmp_path / "parts")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = json.loads((tmp_path / "parts" / "python.cdx.json").read_text())
    names = {component["name"].lower() for component in listed["components"]}
    assert {"medmamba", "torch", "nnunetv2", "numpy"} <= names
    licences = [line.split("\t") for line in (tmp_path / "parts" / "licences.tsv").read_text().splitlines()]
    assert {name.lower() for name, _, _ in licences} == names
    assert "libc6\t" in (tmp_path / "parts" / "debian.tsv").read_text()
