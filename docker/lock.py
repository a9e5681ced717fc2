"""Write a constraints file of the images: the version of everything that a naive installation would take today.

    python docker/lock.py cpu > docker/constraints-cpu.txt
    python docker/lock.py gpu > docker/constraints-gpu.txt

Run it with Python 3.11 on Linux, where pip finds the torch of ``PINS``: for "cpu" give pip PyTorch's index of CPU
wheels, e.g. PIP_EXTRA_INDEX_URL. Needs pip and packaging; installs nothing, but pip may download wheels to read them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]
#: torch and torchvision are released in pairs, and a torchvision for another torch cannot be imported.
PINS = {
    "cpu": ("torch==2.13.0+cpu", "torchvision==0.28.0"),
    "gpu": ("torch==2.13.0", "torchvision==0.28.0", "triton"),
}
#: What is not followed: timm brings torchvision and a client that downloads models. See decisions.md.
LEFT_OUT = {"cpu": ("timm", "torchvision"), "gpu": ()}
HEADS = {
    "cpu": """\
# All that the CPU image holds besides medmamba: it is installed with --no-deps. Written by docker/lock.py.
# torch's version ends in +cpu: no index but PyTorch's own for CPU wheels has it, and no CUDA build fits.
# Not here: timm, which nnU-Net needs for its Primus networks only, and what timm alone needs, torchvision among it.
# A torchvision from the wrong index cannot be imported beside this torch, or it brings a CUDA torch along.
""",
    "gpu": """\
# All that the GPU image holds besides medmamba: it is installed with --no-deps. Written by docker/lock.py.
# torch and torchvision are a pair: change both or neither.
""",
}


def dependencies(metadata: Mapping[str, Any], extras: Collection[str]) -> Iterable[Requirement]:
    """What a package of pip's report needs on this machine, with these of its extras."""
    for text in metadata.get("requires_dist", []):
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def reachable(roots: Iterable[str], packages: Mapping[str, Mapping[str, Any]], left_out: Collection[str]) -> set[str]:
    """Canonical names of all packages that the roots need without going through one that is left out."""
    found: set[tuple[str, str]] = set()
    todo = [Requirement(root) for root in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, ",".join(sorted(requirement.extras)))
        if name not in left_out and key not in found:
            found.add(key)
            todo += dependencies(packages[name], requirement.extras)
    return {name for name, _ in found}


def report(requirements: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Metadata of all that pip would install, by canonical name."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *requirements], stdout=subprocess.PIPE, check=True, text=True)
    packages = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    return {canonicalize_name(metadata["name"]): metadata for metadata in packages}


def main(target: str) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = list(PINS[target])
    packages = report([*project["dependencies"], *pins])
    roots = [*project["dependencies"], *pins]
    names = reachable(roots, packages, LEFT_OUT[target])
    sys.stdout.write(HEADS[target])
    sys.stdout.writelines(f"{name}=={packages[name]['version']}\n" for name in sorted(names))


if __name__ == "__main__":
    main(sys.argv[1])
