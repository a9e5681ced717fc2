"""The rooms and the arrows between them, read from the imports of every file.

``ROOMS`` is the one place that says what a room may import. A module belongs to the room with the longest
matching prefix. Imports of our own rooms inside functions and under ``TYPE_CHECKING`` count like any other.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = (CHECKOUT, CHECKOUT / "kernels", CHECKOUT / "plans", CHECKOUT / "pretrain")
PACKAGES = ("medmamba", "medmamba_kernels", "medmamba_plans", "medmamba_pretrain")

NETWORK_ROOMS = ("medmamba.layers", "medmamba.mixers", "medmamba.networks", "medmamba.weights")
IO_LIBRARIES = frozenset({"nibabel", "SimpleITK"})
ARRAYS = frozenset({"numpy", "scipy"})
PEERS = frozenset({"mamba_ssm", "mambapy"})  # what the bench times where it happens to be installed: no dependencies


@dataclass(frozen=True)
class Room:
    """What the files of one room may import besides the standard library and the room itself.

    Attributes:
        rooms: our own rooms.
        third_party: libraries at the top of a file.
        lazy: further libraries, only inside a function.
    """

    rooms: tuple[str, ...] = ()
    third_party: frozenset[str] = field(default_factory=frozenset)
    lazy: frozenset[str] = field(default_factory=frozenset)


LOWER = (
    *("medmamba_kernels", *NETWORK_ROOMS, "medmamba.presets"),
    *("medmamba.command", "medmamba.entry_points", "medmamba.files", "medmamba.stop"),
)
TORCH = frozenset({"torch"})
TRITON_KERNELS = "medmamba_kernels.backends._triton_kernels"
TRITON_SSD = "medmamba_kernels.backends._triton_ssd"
ROOMS: dict[str, Room] = {
    "medmamba_kernels": Room((TRITON_KERNELS, TRITON_SSD), TORCH, lazy=frozenset({"triton"})),
    # Loaded on first use, by functions of backends.gpu and backends._ssd.
    TRITON_KERNELS: Room(third_party=TORCH | {"triton"}),
    TRITON_SSD: Room((TRITON_KERNELS,), TORCH | {"triton"}),
    "medmamba.layers": Room(("medmamba_kernels",), TORCH),
    "medmamba.mixers": Room(("medmamba_kernels", "medmamba.entry_points", "medmamba.layers"), TORCH),
    # Data about published mixers: names of trainers and plans come from here, in processes without torch too.
    "medmamba.presets": Room(("medmamba.entry_points",)),
    "medmamba.networks": Room(("medmamba_kernels", "medmamba.layers", "medmamba.mixers", "medmamba.presets"), TORCH),
    "medmamba.weights": Room(
        ("medmamba_kernels", *NETWORK_ROOMS, "medmamba.files"), TORCH, lazy=frozenset({"safetensors"})
    ),
    # nnU-Net: plans of before its version 2.5 are read with its own function. It does not search for classes here.
    "medmamba.inference": Room(
        (*LOWER, *(f"medmamba.inference.{part}" for part in ("orientation", "picture", "protocol", "reading"))),
        TORCH | ARRAYS,
        lazy=IO_LIBRARIES | {"monai", "nnunetv2", "safetensors"},
    ),
    # Also read by the corpora of pretraining; a process that only reads images does not import torch.
    "medmamba.inference.reading": Room(third_party=IO_LIBRARIES | {"numpy"}),
    "medmamba.inference.orientation": Room(third_party=frozenset({"nibabel", "numpy"})),
    "medmamba.inference.picture": Room(("medmamba.files", "medmamba.palette"), frozenset({"matplotlib", "numpy"})),
    "medmamba.inference.writing": Room(("medmamba.files", "medmamba.inference.reading"), IO_LIBRARIES | {"numpy"}),
    # One process per folder that needs torch only where its predictor does.
    "medmamba.inference.folder": Room(
        (
            *("medmamba.command", "medmamba.files", "medmamba.stop", "medmamba.inference"),
            *("medmamba.inference.protocol", "medmamba.inference.reading", "medmamba.inference.writing"),
        ),
        frozenset({"numpy"}),
    ),
    # Their command lines join the predictor of the one room with the runner of the other; light at the top.
    "medmamba.inference.predict_command": Room(
        (
            *("medmamba.command", "medmamba.stop", "medmamba.inference", "medmamba.inference.folder"),
            "medmamba.inference.reading",
        ),
        lazy=TORCH,
    ),
    "medmamba.inference.report_command": Room(("medmamba.command", "medmamba.inference.folder")),
    "medmamba.inference.protocol": Room(("medmamba.inference.reading",), frozenset({"numpy"})),
    # What every long training needs, pretraining as well; nothing of nnU-Net.
    "medmamba.training": Room(
        (*LOWER, "medmamba.diagnostics", "medmamba.palette"), TORCH | {"numpy"}, lazy=frozenset({"matplotlib", "tqdm"})
    ),
    # `medmamba predict` with a package is handed on.
    "medmamba.nnunet": Room(
        (
            *(*LOWER, "medmamba.diagnostics", "medmamba.training"),
            *("medmamba.inference", "medmamba.inference.predict_command"),
        ),
        TORCH | {"batchgenerators", "nnunetv2", "numpy"},
    ),
    "medmamba_plans": Room(
        (*LOWER, "medmamba.diagnostics", "medmamba.nnunet", "medmamba_plans.results"),
        lazy=TORCH | {"nnunetv2", "numpy", "scipy"},
    ),
    # Imported by `medmamba collect` when it runs.
    "medmamba_plans.results": Room((*LOWER, "medmamba.nnunet"), frozenset({"numpy"}), lazy=TORCH | {"scipy"}),
    "medmamba_pretrain": Room(("medmamba_kernels", *NETWORK_ROOMS, "medmamba_pretrain.recipe"), TORCH),
    "medmamba_pretrain.recipe": Room(("medmamba.command", "medmamba.networks", "medmamba_pretrain")),
    "medmamba_pretrain.commands": Room(("medmamba.command", "medmamba_pretrain.corpus", "medmamba_pretrain.loop")),
    "medmamba_pretrain.__main__": Room(("medmamba.cli",)),
    "medmamba_pretrain.loop": Room(
        (*LOWER, "medmamba.training", "medmamba_pretrain", "medmamba_pretrain.corpus", "medmamba_pretrain.recipe"),
        TORCH | {"numpy"},
    ),
    "medmamba_pretrain.corpus": Room(
        ("medmamba.command", "medmamba.files", "medmamba.inference.orientation", "medmamba.inference.reading"),
        ARRAYS | {"blosc2", "joblib"},
        lazy=frozenset({"SimpleITK", "dask", "tqdm"}),
    ),
    "medmamba.demo": Room(
        (*LOWER, "medmamba.inference", "medmamba.inference.picture", "medmamba.nnunet", "medmamba_plans"),
        TORCH | ARRAYS | IO_LIBRARIES | {"matplotlib"},
        lazy=frozenset({"monai", "nnunetv2", "tqdm"}),
    ),
    "medmamba.bench": Room((*LOWER, "medmamba.bench.plot", "medmamba.diagnostics"), TORCH, lazy=PEERS),
    "medmamba.bench.plot": Room((*LOWER, "medmamba.bench"), frozenset({"matplotlib"})),  # loaded when a plot is wanted
    "medmamba.diagnostics": Room(("medmamba_kernels", *NETWORK_ROOMS), TORCH),
    "medmamba.info": Room(
        (*LOWER, "medmamba.diagnostics", "medmamba.inference", "medmamba.nnunet"),
        TORCH,
        lazy=frozenset({"matplotlib", "nnunetv2", "numpy"}),
    ),
    "medmamba.new_mixer": Room(("medmamba.command", "medmamba.mixers", "medmamba.presets")),
    "medmamba.command": Room(),
    "medmamba.entry_points": Room(),
    "medmamba.files": Room(),
    "medmamba.palette": Room(),
    "medmamba.stop": Room(),
    "medmamba.cli": Room(("medmamba.command",)),
    "medmamba": Room(("medmamba.networks",)),
}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    eager: bool


def room_of(module: str) -> str:
    """The room with the longest prefix; every module of ours has one because the packages are rooms."""
    candidates = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(candidates, key=len)


def our_files() -> dict[str, Path]:
    """All modules of the three packages, by dotted name."""
    files = {}
    for root in SOURCE_ROOTS:
        for package in PACKAGES:
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                files[name] = path
    return files


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a file with relative ones resolved; ``from a import b`` gives ``a.b``."""
    package = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from (Import(f"{base}.{alias.name}", node.lineno, eager) for alias in node.names)
        inner = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _type_only(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(source), True)


def _type_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a file imports although its room may not, one line each."""
    room = room_of(module)
    allowed = ROOMS[room]
    problems = []
    for item in imports_of(source, module, is_package):
        top = item.module.partition(".")[0]
        where = f"{module}:{item.line} ({room})"
        if top in PACKAGES:
            target = room_of(item.module)
            # `from medmamba import x` with x a plain name of the package reads as room `medmamba`.
            if target not in (room, *allowed.rooms):
                problems.append(f"{where} imports {item.module} of room {target}")
        elif top not in sys.stdlib_module_names and top != "__future__":
            if top not in allowed.third_party | allowed.lazy:
                problems.append(f"{where} imports {top}, which is not for this room")
            elif item.eager and top not in allowed.third_party:
                problems.append(f"{where} imports {top} at the top of the file; move it into a function")
    return problems


def test_every_file_keeps_to_the_arrows_of_its_room():
    files = our_files()
    assert {name.partition(".")[0] for name in files} == set(PACKAGES)
    problems = [
        problem
        for module, path in files.items()
        for problem in violations(path.read_text(), module, path.name == "__init__.py")
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("medmamba_kernels.ops", "import medmamba.networks", "of room medmamba.networks"),
        ("medmamba.layers.norm", "from ..networks import unet", "of room medmamba.networks"),
        (
            "medmamba.networks.vmunet",
            "def f():\n    from medmamba.nnunet import names",
            "of room medmamba.nnunet",
        ),
        ("medmamba.nnunet.trainers", "from medmamba_plans import derive", "of room medmamba_plans"),
        ("medmamba.cli", "from medmamba.demo import run", "of room medmamba.demo"),
        ("medmamba.networks.vmunet", "import numpy as np", "not for this room"),
        ("medmamba_kernels.ops", "import triton", "at the top of the file"),
        ("medmamba.inference.metrics", "from monai.metrics import DiceMetric", "at the top of the file"),
        ("medmamba_plans.derive", "def f():\n    import monai", "not for this room"),
    ],
)
def test_the_checker_sees_a_wrong_import(module, source, problem):
    (found,) = violations(source, module)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("medmamba_kernels.ops", "import math\nimport torch\nfrom . import routes"),
        ("medmamba_kernels.backends.triton", "def load():\n    import triton"),
        ("medmamba.networks.vmunet", "from medmamba_kernels import selective_scan\nfrom .unet import UNet"),
        ("medmamba.inference.metrics", "def nsd():\n    import monai.metrics"),
    ],
)
def test_the_checker_accepts_a_right_import(module, source):
    assert violations(source, module) == []


def test_third_party_imports_are_declared_dependencies():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        requirements += extra
    declared = {_normalised(_distribution_name(text)) for text in requirements}
    distributions = packages_distributions()
    missing = set()
    for module, path in our_files().items():
        for item in imports_of(path.read_text(), module, path.name == "__init__.py"):
            top = item.module.partition(".")[0]
            if top in sys.stdlib_module_names or top in PACKAGES or top in PEERS or top == "__future__":
                continue
            names = {_normalised(name) for name in distributions.get(top, [top])}
            if not names & declared:
                missing.add(f"{module} imports {top}")
    assert not missing, missing


def _distribution_name(requirement: str) -> str:
    name = requirement
    for separator in " <>=!~;[":
        name = name.partition(separator)[0]
    return name


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


BLOCKED = ("nnunetv2", "monai", "triton", "SimpleITK", "nibabel")


@pytest.mark.parametrize("module", ["medmamba_kernels", "medmamba.layers", "medmamba.networks", "medmamba.weights"])
def test_lower_rooms_import_with_only_torch_installed(module):
    code = f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {BLOCKED}:
                    raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

        sys.meta_path.insert(0, Blocker())
        import {module}
        present = [name for name in {BLOCKED} if name in sys.modules]
        assert not present, present
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@dataclass(frozen=True)
class Registry:
    """A dict literal and the folder whose files its entries must cover."""

    where: str
    folder: str
    shared: frozenset[str]  # files of the folder that hold no entry


REGISTRIES = [
    Registry("medmamba_kernels.curves:CURVES", "kernels/medmamba_kernels/curves", frozenset()),
    Registry("medmamba_kernels.backends:BACKENDS", "kernels/medmamba_kernels/backends", frozenset()),
    Registry("medmamba.networks:NETWORKS", "medmamba/networks", frozenset({"arguments", "native", "spec", "unet"})),
]


def _file_of(value: object) -> str:
    """Stem of the file an entry lives in: an entry is a module, a function or a network's specification."""
    if isinstance(value, ModuleType):
        module = value.__name__
    elif callable(value):
        module = value.__module__
    else:
        module = value.build.rpartition(".")[0]
    return module.rpartition(".")[2]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.where)
def test_a_registry_names_every_file_of_its_folder(registry):
    module, _, name = registry.where.partition(":")
    entries = {_file_of(value) for value in getattr(importlib.import_module(module), name).values()}
    files = {path.stem for path in (CHECKOUT / registry.folder).glob("*.py") if not path.stem.startswith("_")}
    files -= registry.shared
    assert files - entries == set(), f"add these to {registry.where}: {sorted(files - entries)}"
    assert entries - files == set(), f"{registry.where} names files that do not exist: {entries - files}"
