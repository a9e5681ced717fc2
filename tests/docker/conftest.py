"""The CPU image, built with buildah and run with podman as root; a model package that it predicts with.

Environment variables:

    MEDMAMBA_TEST_IMAGE            test this image instead of building one
    MEDMAMBA_IMAGE_BUILD_OPTIONS   further options of `buildah bud`: networks, proxies, certificates, local wheels
"""

from __future__ import annotations

import os
import random
import resource
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
MODEL = CHECKOUT / "tests" / "data" / "models" / "hippocampus"
BASE = "python:3.11-slim-bookworm"
TOOLS = ("buildah", "podman", "runc")
#: As docker mounts it; podman would allow to execute files there.
TMPFS = "/tmp:rw,noexec,nosuid,nodev,size=2g"


def call(
    *command: str | Path, timeout: float = 300, cwd: Path = CHECKOUT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program; output and errors in one."""
    return subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@dataclass
class Podman:
    """Runs one image with next to no rights.

    Attributes:
        image: its name.
        configuration: containers.conf for this machine.
    """

    image: str
    configuration: Path

    def __call__(self, *arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        # Not in the checkout: podman's monitor leaves a file `oom` where it was started.
        folder = self.configuration.parent
        return call("podman", *arguments, timeout=timeout, cwd=folder, CONTAINERS_CONF=str(self.configuration))

    def run(
        self,
        *arguments: str | Path,
        mounts: Mapping[Path, str] | None = None,
        entrypoint: str | None = None,
        user: int = 54321,
        memory: str = "4g",
        options: Sequence[str] = ("--rm",),
    ) -> subprocess.CompletedProcess[str]:
        """Run the image; ``mounts`` maps a path here to one there, which may end with ``:ro``."""
        restrictions = f"--network none --read-only --read-only-tmpfs=false --tmpfs {TMPFS} --cap-drop ALL"
        limits = f"--security-opt no-new-privileges --shm-size 64k --pids-limit 256 --memory {memory}"
        volumes = [part for here, there in (mounts or {}).items() for part in ("--volume", f"{here}:{there}")]
        # podman's own timers need systemd, even to run no health check.
        entry = ["--no-healthcheck", *(["--entrypoint", entrypoint] if entrypoint else [])]
        settings = [*restrictions.split(), *limits.split(), "--user", f"{user}:{user}", *volumes, *entry, *options]
        # The container would outlive a podman that is killed here.
        return self("run", "--timeout", "900", *settings, self.image, *arguments, timeout=1000)


def why_not() -> str | None:
    """Why no image can be built and run here."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install buildah podman runc mmdebstrap)"
    if os.geteuid() != 0:
        return "images are built and run as root, and this is another user"
    return None


def bounded(kind: int) -> int:
    """4096, or less where this process may not have as many."""
    hard = resource.getrlimit(kind)[1]
    return 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)


@pytest.fixture(scope="session")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """podman's settings: runc, limits within those of this process, one thread."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    limits = [
        f'"{name}={bounded(kind)}:{bounded(kind)}"'
        for name, kind in {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}.items()
    ]
    path = tmp_path_factory.mktemp("podman") / "containers.conf"
    # One thread: two on a busy core spend their time waiting for each other.
    containers = f'[containers]\nenv = ["OMP_NUM_THREADS=1"]\ndefault_ulimits = [{", ".join(limits)}]\n'
    path.write_text(f'{containers}[engine]\nruntime = "runc"\n')
    return path


def make_base(folder: Path) -> None:
    """The base image from Debian's packages: what the official one is, where no registry can be reached."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip(f"the image {BASE} is not here and mmdebstrap is not installed to make one like it")
    packages = "python3,python3-venv,ca-certificates"
    link = "ln -s python3 $1/usr/bin/python"
    options = ["--variant=minbase", f"--include={packages}", "--dpkgopt=path-exclude=/usr/share/doc/*"]
    made = call("mmdebstrap", *options, f"--customize-hook={link}", "bookworm", folder / "base.tar", timeout=1800)
    assert made.returncode == 0, made.stdout[-3000:]
    imported = call("podman", "import", folder / "base.tar", f"localhost/{BASE}")
    assert imported.returncode == 0, imported.stdout
    (folder / "base.tar").unlink()


@pytest.fixture(scope="session")
def image(configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of the image under test."""
    given = os.environ.get("MEDMAMBA_TEST_IMAGE")
    if given:
        return given
    if call("podman", "image", "exists", BASE).returncode != 0:
        make_base(tmp_path_factory.mktemp("base"))
    name = "localhost/medmamba:test"
    options = shlex.split(os.environ.get("MEDMAMBA_IMAGE_BUILD_OPTIONS", ""))
    labels = {"VERSION": "0.0.test", "REVISION": "0123abc", "CREATED": "2026-01-01T00:00:00Z", "SOURCE": "here"}
    arguments = [part for key, value in labels.items() for part in ("--build-arg", f"{key}={value}")]
    settings = ["--pull-never", "--layers", "--format=docker", "--isolation=chroot", "--file=docker/Dockerfile"]
    built = call(
        "buildah", "bud", *settings, "--target=cpu", *arguments, *options, f"--tag={name}", CHECKOUT, timeout=7200
    )
    assert built.returncode == 0, built.stdout[-3000:]
    return name


@pytest.fixture(scope="session")
def podman(image: str, configuration: Path) -> Podman:
    return Podman(image, configuration)


@pytest.fixture
def user() -> int:
    """Somebody whom the image does not know."""
    return random.SystemRandom().randrange(20_000, 60_000)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model of the repository, where any user may read it."""
    return shutil.copytree(MODEL, tmp_path_factory.mktemp("models") / "hippocampus")
