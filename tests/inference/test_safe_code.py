"""No code on the way of a prediction can run what a file says: read from the source of inference and all it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ROOTS = {"medmamba": CHECKOUT, "medmamba_kernels": CHECKOUT / "kernels"}
UNSAFE_MODULES = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "pydoc", "shelve"})
UNSAFE_NAMES = frozenset({"eval", "exec", "compile", "__import__"})
#: Ours, but not on the way of a prediction: what nnU-Net's commands need.
FORBIDDEN_ROOMS = ("medmamba.nnunet", "medmamba_plans", "medmamba_pretrain")


def file_of(module: str) -> Path | None:
    """File of a module of ours; None when the name is no module, as in ``from medmamba.files import write_json``."""
    base = ROOTS[module.partition(".")[0]].joinpath(*module.split("."))
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Names that a file imports, relative ones resolved, anywhere in it."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def files_of_prediction() -> dict[str, Path]:
    """Every module of ours that inference is made of or imports, directly or not, with its file."""
    folder = CHECKOUT / "medmamba" / "inference"
    waiting = [
        ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
    ]
    found: dict[str, Path] = {}
    while waiting:
        module = waiting.pop()
        path = file_of(module)
        if path is None or module in found:
            continue
        found[module] = path
        waiting.append(module.rpartition(".")[0] or module)
        names = imported(ast.parse(path.read_text()), module, path.name == "__init__.py")
        waiting += [name for name in names if name.partition(".")[0] in ROOTS]
    return found


def unsafe(source: str, module: str = "medmamba.inference.example") -> list[str]:
    """What in a file could run code from data, one line each."""
    tree = ast.parse(source)
    problems = [
        f"{module} imports {name}"
        for name in imported(tree, module, False)
        if name.partition(".")[0] in UNSAFE_MODULES or name.startswith(FORBIDDEN_ROOMS)
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{module}:{node.lineno} calls {called}"
        if called in UNSAFE_NAMES or called.rpartition(".")[2] in ("locate", "load_pickle"):
            problems.append(where)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        is_torch_load = called == "torch.load"
        safe = isinstance(keywords.get("weights_only"), ast.Constant) and keywords["weights_only"].value is True
        if (is_torch_load or "weights_only" in keywords) and not safe:
            problems.append(f"{where} without weights_only=True")
        if "allow_pickle" in keywords:
            problems.append(f"{where} with allow_pickle")
    return problems


def test_nothing_that_a_prediction_imports_can_run_code_from_a_file():
    files = files_of_prediction()
    assert {"medmamba.inference.model.load", "medmamba.weights.files", "medmamba.networks.vmunet"} <= set(files)
    assert {"medmamba_kernels.ops", "medmamba.files"} <= set(files)
    problems = [problem for module, path in files.items() for problem in unsafe(path.read_text(), module)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "from pydoc import locate",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "__import__(text)",
        "from batchgenerators.utilities.file_and_folder_operations import load_pickle\nload_pickle(path)",
        "from medmamba.nnunet.architecture import build_network",
    ],
)
def test_the_checker_sees_unsafe_code(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source", ["network.eval()", "import re\nre.compile(text)", "torch.load(p, weights_only=True)"]
)
def test_the_checker_accepts_safe_code(source):
    assert not unsafe(source)
