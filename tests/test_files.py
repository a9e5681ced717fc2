"""Atomic writing, and locks."""

from __future__ import annotations

import errno
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from medmamba.files import append_line, sha256_of, temporaries_in, try_lock, write_atomically, write_json


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


HOLD = """\
import sys
from medmamba.files import try_lock
stream = open(sys.argv[1], "ab")
print(try_lock(stream.fileno(), shared=sys.argv[2] == "shared"), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("first", "second", "gets_it"),
    [("alone", "alone", False), ("alone", "shared", False), ("shared", "alone", False), ("shared", "shared", True)],
)
def test_a_lock_keeps_other_processes_out_until_its_holder_is_gone(tmp_path, first, second, gets_it):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path), first]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    with path.open("ab") as stream:
        assert try_lock(stream.fileno(), shared=second == "shared") is gets_it
    holder.kill()
    holder.communicate()
    with path.open("ab") as stream:
        assert try_lock(stream.fileno())


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fails)
    with (tmp_path / "lock").open("ab") as stream:
        assert try_lock(stream.fileno())
    assert "no lock on this file system" in caplog.text
