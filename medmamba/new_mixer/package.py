"""Checks the name of a new mixer, and writes its package from the template."""

from __future__ import annotations

import keyword
import re
import shutil
import sys
import tempfile
from collections.abc import Collection
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from string import Template

from medmamba.command import CommandError

_TEMPLATE = Path(__file__).parent / "template"
#: File of the template -> where it goes.
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "core.py.txt": "src/$name/__init__.py",
    "test.py.txt": "tests/test_$name.py",
}
_LEGAL = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def check_name(name: str, taken: Collection[str]) -> None:
    """A name that a package, a plans file and a command line can hold, and nothing else has.

    Args:
        name: of the mixer, its core and their package.
        taken: names of our mixers and cores.

    Raises:
        CommandError: it is not such a name; the text says why.
    """
    if not _LEGAL.fullmatch(name) or keyword.iskeyword(name):
        raise CommandError(
            f"{name!r} cannot be the name of a package; use small letters, digits and single underscores, a letter "
            "first, e.g. ema3d"
        )
    if name in taken:
        raise CommandError(
            f"medmamba has a mixer or core {name!r} of its own, which would be found first; choose another name"
        )
    if name in sys.stdlib_module_names or find_spec(name) is not None:
        raise CommandError(f"a module {name!r} is installed already; choose another name")


def title_of(name: str) -> str:
    """A name as names of plans and classes spell it: my_mixer3d -> MyMixer3D."""
    return re.sub(r"(?<=\d)d$", "D", "".join(part.capitalize() for part in name.split("_")))


def write_package(name: str, folder: Path) -> list[Path]:
    """Write the files of a new package; all of them or none.

    Args:
        name: checked by :func:`check_name`.
        folder: new, or empty; the folder that it is in exists.

    Returns:
        The files.

    Raises:
        CommandError: the folder holds something, is a file, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{folder} is there already and not an empty folder; choose another -o")
    if not folder.absolute().parent.is_dir():
        raise CommandError(f"the folder of {folder} does not exist; make it, or choose another -o")
    words = {"name": name, "title": title_of(name), "year": str(date.today().year)}
    try:
        return _write(folder, words)
    except OSError as error:
        raise CommandError(f"{folder} cannot be written ({error}); choose another -o") from error


def _write(folder: Path, words: dict[str, str]) -> list[Path]:
    """Beside the folder first, so that it appears complete."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        whole = temporary / folder.name
        names = [Template(target).substitute(words) for target in FILES.values()]
        for source, target in zip(FILES, names, strict=True):
            text = Template((_TEMPLATE / source).read_text(encoding="utf-8")).substitute(words)
            (whole / target).parent.mkdir(parents=True, exist_ok=True)
            (whole / target).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        whole.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [folder / target for target in names]
