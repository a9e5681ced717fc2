"""Memory of the process, and limits of containers as their files say them."""

from __future__ import annotations

import pytest

from medmamba.inference import memory


def test_a_process_has_held_at_least_what_it_holds_and_no_more_than_it_may():
    assert 2**20 < memory.resident_bytes() <= memory.peak_bytes() + 2**20
    assert memory.peak_bytes() < memory.usable_bytes() <= memory.physical_bytes()


@pytest.mark.parametrize(
    ("group", "file", "content", "limit"),
    [
        ("0::/box", "box/memory.max", "1048576\n", 2**20),
        ("0::/box/inner", "box/memory.max", "1048576\n", 2**20),
        ("0::/", "memory.max", "1048576\n", 2**20),
        ("0::/box", "box/memory.max", "max\n", None),
        ("0::/box", "other/memory.max", "1048576\n", None),
        ("4:memory:/box", "memory/box/memory.limit_in_bytes", "1048576\n", 2**20),
        ("4:memory:/box", "memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("3:cpuset:/box", "memory/box/memory.limit_in_bytes", "1048576\n", None),
    ],
)
def test_the_limit_of_the_container_counts_where_it_is_known(tmp_path, monkeypatch, group, file, content, limit):
    (tmp_path / "groups" / file).parent.mkdir(parents=True)
    (tmp_path / "groups" / file).write_text(content)
    (tmp_path / "cgroup").write_text(f"{group}\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    assert memory.usable_bytes() == (limit or memory.physical_bytes())
