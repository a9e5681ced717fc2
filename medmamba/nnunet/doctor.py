"""What ``medmamba doctor`` examines: versions, the scan's backends, nnU-Net's folders, the trainer look-up."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.nnunet.folders import FOLDERS
from medmamba.nnunet.names import EXT_TRAINER, TRAINER_VARIANTS, ext_trainer_value, trainers_folder

if TYPE_CHECKING:
    import torch

#: Distributions whose version is reported; all are dependencies of medmamba.
PACKAGES = (
    "medmamba",
    "torch",
    "nnunetv2",
    "monai",
    "nibabel",
    "numpy",
    "safetensors",
    "SimpleITK",
    "tensorboard",
)
_CHILD_SECONDS = 300
#: What nnU-Net's search for trainers imports and nothing of ours does: an image for prediction leaves them out.
_FOR_SEARCH = ("timm", "torchvision")
_MEND_FIRST = "mend the failing lines above first; if there are none, reinstall medmamba, torch and nnunetv2"


@dataclass(frozen=True)
class Check:
    """One line of the report. ``status`` is "ok", "note" (works, but worth knowing) or "fail"."""

    status: str
    name: str
    detail: str
    remedy: str = ""


def examine() -> Iterator[Check]:
    """Run every check, one after the other; none of them raises for what it finds."""
    for checks in (check_versions, check_torchvision, check_backends, check_folders, check_lookup):
        try:
            yield from checks()
        except Exception as error:  # torch that cannot be imported, for instance: the other checks still help
            name = checks.__name__.replace("_", " ")
            yield Check("fail", name, _one_line(f"{type(error).__name__}: {error}"), _MEND_FIRST)


def heading() -> str:
    """First line of the report."""
    return f"medmamba doctor: Python {platform.python_version()}, {platform.system()} {platform.machine()}\n"


def line(check: Check) -> str:
    """A check as a line of the table, its remedy below."""
    text = f"{check.status:<4}  {check.name:<30}  {check.detail}"
    return f"{text}\n{'':<38}-> {check.remedy}" if check.remedy else text


def summary(checks: Sequence[Check]) -> str:
    """Last line of the report."""
    failed = sum(check.status == "fail" for check in checks)
    return f"\n{failed} of {len(checks)} checks failed" if failed else "\nall required checks passed"


def check_versions() -> Iterator[Check]:
    """Every dependency is there, in a version that is supported."""
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Check("fail", package, "not installed", f"pip install {package}")
            continue
        problem = unsupported(package, found)
        if problem is None:
            yield Check("ok", package, found)
        else:
            yield Check("fail", package, f"{found}: {problem[0]}", problem[1])


def unsupported(package: str, found: str) -> tuple[str, str] | None:
    """(cause, remedy) when a version is outside what medmamba supports, else None."""
    release = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if package == "nnunetv2" and not (2, 8) <= release < (3, 0):
        return "medmamba needs 2.8 or newer, below 3", "pip install 'nnunetv2>=2.8,<3'"
    if package == "torch" and (release < (2, 8) or release == (2, 9)):
        return (
            "medmamba needs 2.8 or newer, and nnU-Net excludes 2.9",
            "pip install 'torch>=2.8,!=2.9.*' torchvision",
        )
    return None


def check_torchvision() -> Iterator[Check]:
    """torchvision fits torch: nnU-Net's look-up of trainers imports both, and dies when they do not match."""
    missing = _missing_for_search()
    if missing:
        yield Check(
            "note",
            "torchvision fits torch",
            f"not installed: {', '.join(missing)}; nnU-Net's search for trainers needs them, `medmamba train`, "
            "`medmamba predict` and the stock trainer nnUNetTrainer do not",
            "only if you need the search: pip install timm torchvision, torchvision from the same source as torch",
        )
        return
    outcome = _in_child("import torchvision; torchvision.ops.nms; result = torchvision.__version__")
    if "error" in outcome:
        yield Check(
            "fail",
            "torchvision fits torch",
            f"importing it fails: {outcome['error']}",
            "install both from one source in one go: pip install --force-reinstall torch torchvision (for CPU-only "
            "builds give both the same --index-url); until then only `medmamba train`, `medmamba predict` and the "
            "stock trainer nnUNetTrainer work",
        )
    else:
        yield Check("ok", "torchvision fits torch", f"{outcome['result']} imports, operators registered")


def _missing_for_search() -> list[str]:
    return [name for name in _FOR_SEARCH if find_spec(name) is None]


def check_backends() -> Iterator[Check]:
    """Every backend of the scan that can run here gives the numbers of the float64 reference."""
    import torch

    from medmamba_kernels.backends import BACKENDS, BackendError, choose_backend

    for device in [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
        for name in BACKENDS:
            reason = BACKENDS[name].unavailable_reason(device)
            if reason is None:
                yield _self_test(name, device)
            else:
                yield Check("note", f"scan backend {name} on {device}", f"not available: {reason}")
        try:
            yield Check("ok", f"scan on {device}", f"uses {choose_backend('auto', device)}")
        except (ValueError, BackendError) as error:
            yield Check("fail", f"scan on {device}", str(error), "unset MEDMAMBA_BACKEND, or name another backend")


def _self_test(backend: str, device: torch.device) -> Check:
    import torch

    from medmamba_kernels.testing import TOLERANCES, self_test

    name = f"scan backend {backend} on {device}"
    remedy = f"run with MEDMAMBA_BACKEND set to another backend than {backend}, and report this table"
    try:
        error, passed = self_test(backend, device)
    except Exception as problem:  # a backend may fail in any way, and the table has to go on
        return Check("fail", name, _one_line(f"{type(problem).__name__}: {problem}"), remedy)
    limit = TOLERANCES[torch.float32]["y"]
    detail = f"relative error {error:.1e} against the reference (limit {limit:.0e})"
    if passed:
        return Check("ok", name, detail)
    return Check("fail", name, detail if not error <= limit else f"{detail}, but wrong gradients", remedy)


def check_folders() -> Iterator[Check]:
    """nnU-Net's three folders."""
    yield from map(check_folder, FOLDERS)


def check_folder(variable: str) -> Check:
    """One of nnU-Net's three folders is set, there, and can be written where nnU-Net writes."""
    value = os.environ.get(variable)
    export = f"export {variable}=/some/folder"
    if not value:
        return Check("note", variable, f"not set; nnU-Net needs it for {FOLDERS[variable]}", export)
    if not Path(value).is_dir():
        return Check("fail", variable, f"{value} is not a folder", f"mkdir -p {value}, or correct the variable")
    if not os.access(value, os.R_OK | os.X_OK):
        return Check("fail", variable, f"{value} cannot be read", f"chmod u+rx {value}, or choose another folder")
    if not os.access(value, os.W_OK | os.X_OK):
        if variable == "nnUNet_raw":
            return Check("ok", variable, f"{value} (read-only, which is enough)")
        return Check("fail", variable, f"{value} cannot be written", f"chmod u+w {value}, or choose another folder")
    return Check("ok", variable, value)


def check_lookup() -> Iterator[Check]:
    """nnU-Net finds our trainers, through its own look-up, here and in a child process."""
    folders = [folder for folder in os.environ.get(EXT_TRAINER, "").split(os.pathsep) if folder.strip()]
    if str(trainers_folder()) in folders:
        yield Check("ok", EXT_TRAINER, os.environ[EXT_TRAINER])
    else:
        yield Check(
            "note",
            EXT_TRAINER,
            "does not name our folder; stock nnUNetv2_ commands need it for -tr, `medmamba train` and `run` do not",
            'eval "$(medmamba env)"',
        )
    missing = _missing_for_search()
    if missing:
        yield Check("note", "trainer look-up", f"not tried: nnU-Net's search needs {' and '.join(missing)}")
        return
    name = next(iter(TRAINER_VARIANTS))
    yield _lookup_check("trainer look-up, this process", _here(name))
    yield _lookup_check("trainer look-up, child process", _in_child(_LOOKUP.format(name=name)))


_LOOKUP = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
result = find({name!r}).__module__
"""


def _lookup_check(line: str, outcome: dict[str, str]) -> Check:
    if outcome.get("result") == "medmamba.nnunet.trainers":
        return Check("ok", line, f"nnU-Net finds {next(iter(TRAINER_VARIANTS))} and {len(TRAINER_VARIANTS) - 1} more")
    found = outcome.get("error") or f"found in {outcome.get('result')} instead of medmamba.nnunet.trainers"
    return Check("fail", line, found, _MEND_FIRST)


def _here(name: str) -> dict[str, str]:
    """nnU-Net's own look-up in this process, with our folder in the variable for as long as it lasts."""
    before = os.environ.get(EXT_TRAINER)
    os.environ[EXT_TRAINER] = ext_trainer_value()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            return {"result": recursive_find_trainer_class_by_name(name).__module__}
    except Exception as error:
        return {"error": _one_line(f"{type(error).__name__}: {error}")}
    finally:
        if before is None:
            del os.environ[EXT_TRAINER]
        else:
            os.environ[EXT_TRAINER] = before


def _in_child(code: str) -> dict[str, str]:
    """Run code that sets ``result`` in a fresh Python; {"result": ...}, or {"error": last line of its traceback}."""
    script = f"{code}\nimport json\nprint('\\n' + json.dumps({{'result': result}}))"
    environment = {**os.environ, EXT_TRAINER: ext_trainer_value()}
    try:
        child = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=environment,
            timeout=_CHILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_CHILD_SECONDS} s"}
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines()
        return {"error": _one_line(lines[-1]) if lines else f"exit code {child.returncode}"}
    return json.loads(child.stdout.splitlines()[-1])


def _one_line(text: str) -> str:
    return " ".join(text.split())
