"""Atomic writing."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from medmamba.files import append_line, sha256_of, temporaries_in, write_atomically, write_json


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


def test_a_content_that_fails_its_check_never_gets_the_name(tmp_path):
    def refuse(temporary: str) -> None:
        assert Path(temporary).read_text() == "new"
        raise ValueError("not what was meant")

    with pytest.raises(ValueError, match="not what was meant"):
        write_atomically(tmp_path / "file", lambda temporary: Path(temporary).write_text("new"), refuse)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_leaves_is_found_with_the_name_it_was_for(tmp_path):
    seen = {}
    (tmp_path / ".other.tmp").write_text("")
    write_atomically(tmp_path / "case.nii.gz", lambda temporary: seen.update({temporary: temporaries_in(tmp_path)}))
    ((temporary, found),) = seen.items()
    assert found == {Path(temporary): "case.nii.gz"}
    assert temporaries_in(tmp_path) == {}


def test_lines_are_appended_in_utf8_and_nan_is_refused(tmp_path):
    append_line(tmp_path / "lines", {"name": "Leber ü"})
    append_line(tmp_path / "lines", {"ml": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        append_line(tmp_path / "lines", {"ml": float("nan")})
    assert (tmp_path / "lines").read_text("utf-8") == '{"name": "Leber ü"}\n{"ml": 1.5}\n'


def test_a_name_that_is_no_utf8_comes_back_from_a_line(tmp_path):
    append_line(tmp_path / "lines", {"name": "a\udcff"})
    assert json.loads((tmp_path / "lines").read_bytes()) == {"name": "a\udcff"}


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")
