"""Processors and memory of a container, read from the files of a made-up system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medmamba.inference import machine
from medmamba.inference.machine import available_bytes, resident_bytes, threads_available, usable_bytes
from medmamba.inference.predictor import model_predictor
from medmamba.inference.predictor.model_predictor import limit_threads

GIB = 2**30
V2_INSIDE = {"proc/self/cgroup": "0::/\n"}
V2_OUTSIDE = {"proc/self/cgroup": "0::/machine/job-7\n"}
V1 = {"proc/self/cgroup": "5:memory:/docker/ab12\n4:cpu,cpuacct:/docker/ab12\n1:name=systemd:/x\n"}


@pytest.fixture
def system(tmp_path):
    def build(*files):
        for path, text in [item for part in files for item in part.items()]:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return build


def v1_cpu(folder, quota):
    return V1 | {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        pytest.param({}, 16, id="no groups"),
        pytest.param(V2_INSIDE | {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16, id="v2 without limit"),
        pytest.param(V2_INSIDE | {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4, id="v2"),
        pytest.param(V2_INSIDE | {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2, id="part of a core"),
        pytest.param(V2_INSIDE | {"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1, id="less than one"),
        pytest.param(V2_INSIDE | {"sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 16, id="more than there are"),
        pytest.param(V2_OUTSIDE | {"sys/fs/cgroup/machine/cpu.max": "300000 100000\n"}, 3, id="v2, group above"),
        pytest.param(v1_cpu("sys/fs/cgroup/cpu,cpuacct", "200000"), 2, id="v1 in a container"),
        pytest.param(v1_cpu("sys/fs/cgroup/cpu/docker/ab12", "500000"), 5, id="v1 on the host"),
        pytest.param(v1_cpu("sys/fs/cgroup/cpu", "-1"), 16, id="v1 without limit"),
        pytest.param(V2_INSIDE | {"sys/fs/cgroup/cpu.max": "no number\n"}, 16, id="garbled"),
    ],
)
def test_threads_are_the_least_of_cores_and_quotas(system, monkeypatch, files, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert threads_available(system(files)) == threads


MEMINFO = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {32 * 2**20} kB\n"}


def v2_memory(folder, limit, used, **stat):
    facts = "anon 7\n" + "".join(f"{name} {value}\n" for name, value in stat.items())
    return {
        f"{folder}/memory.max": str(limit),
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": facts,
    } | MEMINFO


def v1_memory(limit, used, **stat):
    folder = "sys/fs/cgroup/memory/docker/ab12/memory"
    facts = "".join(f"{name} {value}\n" for name, value in stat.items())
    files = {f"{folder}.limit_in_bytes": str(limit), f"{folder}.usage_in_bytes": str(used), f"{folder}.stat": facts}
    return MEMINFO | V1 | files


TOP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        pytest.param(MEMINFO, 32 * GIB, id="no groups"),
        pytest.param(V2_INSIDE | v2_memory(TOP, "max", 5), 32 * GIB, id="v2 without limit"),
        pytest.param(V2_INSIDE | v2_memory(TOP, 12 * GIB, 2 * GIB), 10 * GIB, id="v2"),
        pytest.param(V2_INSIDE | v2_memory(TOP, 12 * GIB, 2 * GIB, inactive_file=GIB), 11 * GIB, id="v2, files"),
        pytest.param(V2_OUTSIDE | v2_memory(f"{TOP}/machine", 6 * GIB, GIB), 5 * GIB, id="v2, group above"),
        pytest.param(v1_memory(8 * GIB, 3 * GIB, inactive_file=5, total_inactive_file=GIB), 6 * GIB, id="v1"),
        pytest.param(v1_memory(2**63 - 4096, 3 * GIB), 32 * GIB, id="v1 without limit"),
        pytest.param(V2_INSIDE | v2_memory(TOP, 5, 9), 0, id="full"),
        pytest.param({}, None, id="no files"),
    ],
)
def test_memory_is_the_least_of_system_and_limits(system, files, available):
    assert available_bytes(system(files)) == available


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says so")
def test_used_memory_grows_with_what_is_held():
    before = resident_bytes()
    held = b"x" * (64 * 2**20)
    assert len(held) <= resident_bytes() - before < 2 * len(held)


@pytest.fixture
def threads_of_torch():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("chosen", "before", "available", "after"),
    [(None, 4, 2, 2), (None, 2, 4, 2), ("4", 4, 2, 4)],
    ids=["quota", "fewer before", "OMP_NUM_THREADS"],
)
def test_threads_are_limited_unless_the_user_chose_them(
    monkeypatch, threads_of_torch, chosen, before, available, after
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    monkeypatch.setattr(model_predictor, "threads_available", lambda: available)
    torch.set_num_threads(before)
    limit_threads()
    assert torch.get_num_threads() == after


def test_this_machine_says_what_it_has():
    assert 1 <= threads_available() <= (os.cpu_count() or 1)
    assert machine.available_bytes() is None or machine.available_bytes() > 0


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
def test_the_limit_of_the_container_counts_where_it_is_known(system, group, file, content, limit):
    root = system({f"sys/fs/cgroup/{file}": content, "proc/self/cgroup": f"{group}\n"})
    assert usable_bytes(root) == (limit or machine.physical_bytes())


def test_a_process_has_held_at_least_what_it_holds_and_no_more_than_it_may():
    assert 2**20 < resident_bytes() <= machine.peak_bytes() + 2**20
    assert machine.peak_bytes() < usable_bytes() <= machine.physical_bytes()


def test_a_process_does_not_count_what_its_parent_held():
    held = bytearray(300 * 2**20)
    code = "from medmamba.inference.machine import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(held)
