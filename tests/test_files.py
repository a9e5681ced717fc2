"""Atomic writing."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from medmamba.files import write_atomically, write_json


def test_json_comes_back_with_its_order(tmp_path):
    content = {"b": [1, 2.5, None], "a": {"x": "ü"}}
    write_json(tmp_path / "file.json", content)
    assert list(json.loads((tmp_path / "file.json").read_text()).items()) == list(content.items())


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_halfway(temporary: str) -> None:
        Path(temporary).write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail_halfway)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_content_that_is_not_json_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_json(tmp_path / "ours", {})
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "ours")}
    assert modes["ours"] == modes["ordinary"]
