"""``medmamba new-mixer``: a whole package that works, or nothing at all."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from medmamba.cli import main
from medmamba.mixers import get_core
from medmamba.new_mixer.package import FILES, title_of
from medmamba.presets import get_mixer


@pytest.fixture
def written(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    assert main(["new-mixer", "my_ema3d"]) == 0
    yield tmp_path / "my_ema3d"
    sys.modules.pop("my_ema3d", None)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_files_of_a_package_are_written_and_nothing_else(written):
    expected = {"pyproject.toml", "README.md", "src/my_ema3d/__init__.py", "tests/test_my_ema3d.py"}
    assert files_in(written.parent) == {f"my_ema3d/{name}" for name in expected}
    assert len(FILES) == len(expected)


def test_no_placeholder_is_left_and_no_line_is_too_long(written):
    for name in files_in(written):
        text = (written / name).read_text()
        assert "$" not in text, name
        assert max(map(len, text.splitlines())) <= 120, name


def entry_points_of(package: Path) -> str:
    groups = tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]
    sections = [[f"[{group}]", *(f"{k} = {v}" for k, v in points.items())] for group, points in groups.items()]
    return "\n".join(line for section in sections for line in section)


def test_medmamba_finds_mixer_and_core_by_the_entry_points(written, add_distribution, monkeypatch):
    add_distribution("my-ema3d", entry_points_of(written))
    monkeypatch.syspath_prepend(written / "src")
    spec = get_mixer("my_ema3d")
    assert (spec.name, spec.title, spec.block["core"]) == ("my_ema3d", "MyEma3D", "my_ema3d")
    assert get_core("my_ema3d").__name__ == "MyEma3DCore"
    with pytest.raises(ValueError, match="reach of my_ema3d must be 1 token or more"):
        get_core("my_ema3d")(4, d_state=1, dt_rank=1, routes="raster", reach=0.5)


@pytest.mark.slow
def test_the_package_that_is_written_keeps_the_laws_by_its_own_tests(written, add_distribution):
    site = add_distribution("my-ema3d", entry_points_of(written))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(written)],
        cwd=written.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(written / "src")])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize(
    ("name", "title"),
    [("ema3d", "Ema3D"), ("my_mixer", "MyMixer"), ("a2_b3d", "A2B3D"), ("round", "Round"), ("x", "X")],
)
def test_a_title_is_letters_and_digits(name, title):
    assert title_of(name) == title


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Ema3D", "'Ema3D' cannot be the name of a package; use small letters"),
        ("3d", "cannot be the name"),
        ("my-mixer", "cannot be the name"),
        ("../up", "cannot be the name"),
        ("a__b", "cannot be the name"),
        ("lambda", "cannot be the name"),
        ("", "cannot be the name"),
        ("vim3d", "medmamba has a mixer or core 'vim3d' of its own"),
        ("scan", "medmamba has a mixer or core 'scan' of its own"),
        ("json", "a module 'json' is installed already"),
        ("torch", "a module 'torch' is installed already"),
    ],
)
def test_a_name_that_will_not_do_is_refused(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-mixer", name]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["full folder", "file", "no folder above"])
def test_a_place_that_will_not_do_is_refused_and_left_alone(kind, tmp_path, capsys):
    place = tmp_path / "place"
    if kind == "full folder":
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    elif kind == "file":
        place.write_text("mine")
    else:
        place = place / "below"
    before = files_in(tmp_path)
    assert main(["new-mixer", "ema3d", "-o", str(place)]) == 2
    assert "-o" in capsys.readouterr().err
    assert files_in(tmp_path) == before
    assert sum(1 for _ in tmp_path.iterdir()) == (kind != "no folder above")


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["new-mixer", "ema3d", "-o", str(tmp_path / "empty")]) == 0
    assert "src/ema3d/__init__.py" in files_in(tmp_path / "empty")


@pytest.mark.parametrize(
    ("error", "exit_code"), [(OSError(28, "No space left"), 2), (KeyboardInterrupt(), 130)], ids=str
)
def test_nothing_is_left_of_what_could_not_be_written(error, exit_code, tmp_path, monkeypatch, capsys):
    write, calls = Path.write_text, []

    def fail_at_the_third(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise error
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", fail_at_the_third)
    assert main(["new-mixer", "ema3d", "-o", str(tmp_path / "ema3d")]) == exit_code
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []
