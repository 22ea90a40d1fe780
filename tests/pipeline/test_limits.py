from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.limits import available_cores, available_memory
from tests.repository import REPOSITORY

MIB = 1 << 20


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own").write_text("0::/job/step\n")
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("800000 100000", 8)]
)
def test_cores_follow_the_quota_of_a_parent_group(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    group(tmp_path / "cg" / "job" / "step", cpu__max="max 100000")
    group(tmp_path / "cg" / "job", cpu__max=quota)
    assert available_cores(tmp_path / "cg", own) == (cores or 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    assert available_cores(tmp_path / "cg", own) == 1


def test_memory_is_the_rest_of_the_tightest_group_and_cached_files_are_free(tmp_path: Path, own: Path) -> None:
    limits = {"memory__max": str(64 * MIB), "memory__current": str(40 * MIB)}
    group(tmp_path / "cg" / "job", **limits, memory__stat=f"anon 1\ninactive_file {10 * MIB}\nfile 3")
    group(tmp_path / "cg" / "job" / "step", memory__max="max", memory__current="5")
    assert available_memory(tmp_path / "cg", own) == 34 * MIB
    (tmp_path / "cg" / "job" / "memory.current").write_text(str(90 * MIB))
    assert available_memory(tmp_path / "cg", own) == 0


@pytest.mark.parametrize(
    ("high", "most", "left"), [(48, 64, 8), (64, 48, 8), (48, None, 8), (None, 48, 8), (None, None, None)]
)
def test_the_limit_above_which_the_kernel_slows_a_process_down_counts(
    tmp_path: Path, own: Path, high: int | None, most: int | None, left: int | None
) -> None:
    limits = {"high": high, "max": most}
    texts = {f"memory__{name}": "max" if mib is None else str(mib * MIB) for name, mib in limits.items()}
    group(tmp_path / "cg" / "job", **texts, memory__current=str(40 * MIB))
    group(tmp_path / "cg" / "job" / "step", memory__max=str(1 << 62), memory__high="max", memory__current="5")
    free = available_memory(tmp_path / "cg", own)
    assert free == left * MIB if left is not None else free > 100 * MIB


def test_cached_files_in_use_count_below_the_hard_limit_only(tmp_path: Path, own: Path) -> None:
    stat = f"active_file {20 * MIB}\ninactive_file {10 * MIB}"
    group(tmp_path / "cg" / "job", memory__high=str(48 * MIB), memory__current=str(40 * MIB), memory__stat=stat)
    assert available_memory(tmp_path / "cg", own) == 38 * MIB
    group(tmp_path / "cg" / "job", memory__max=str(48 * MIB))
    assert available_memory(tmp_path / "cg", own) == 18 * MIB


@pytest.mark.parametrize("tight", ["", "slurm", "slurm/job", "slurm/job/step"])
def test_the_tightest_of_nested_groups_counts_in_both_versions(tmp_path: Path, tight: str) -> None:
    (tmp_path / "own").write_text("4:memory:/slurm/job/step\n")
    # The kernel writes this number for no limit.
    free = {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "4096"}
    for folder in ("", "slurm", "slurm/job", "slurm/job/step"):
        group(tmp_path / "cg" / "memory" / folder, **free)
    group(tmp_path / "cg" / "memory" / tight, **{"memory.limit_in_bytes": "9096"})
    assert available_memory(tmp_path / "cg", tmp_path / "own") == 5000
    (tmp_path / "own").write_text("0::/slurm/job/step\n")
    for folder in ("", "slurm", "slurm/job", "slurm/job/step"):
        group(tmp_path / "cg" / folder, memory__max="max", memory__high="max", memory__current="4096")
    group(tmp_path / "cg" / tight, memory__high="10096")
    assert available_memory(tmp_path / "cg", tmp_path / "own") == 6000


@pytest.mark.parametrize("line", ["0::/docker/abc", "0::/../../docker/abc", "7:memory:/docker/abc"])
def test_in_a_container_the_root_is_its_own_group(tmp_path: Path, line: str) -> None:
    (tmp_path / "own").write_text(line + "\n")
    root = tmp_path / "deep" / "sys" / "cg"
    group(root, memory__max="9096", memory__current="4096")
    group(root / "memory", **{"memory.limit_in_bytes": "9096", "memory.usage_in_bytes": "4096"})
    assert available_memory(root, tmp_path / "own") == 5000


def test_memory_ends_at_the_limit_of_the_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a process has mapped does not count: a batch must not run out of addresses from one slide to the next.
    monkeypatch.setattr(resource, "getrlimit", lambda _: (300 * MIB, resource.RLIM_INFINITY))
    assert available_memory(tmp_path, tmp_path / "none") == 300 * MIB
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert available_memory(tmp_path, tmp_path / "none") > 400 * MIB


def test_memory_ends_at_a_real_limit_of_the_address_space() -> None:
    code = "from pipeline.limits import available_memory; print(available_memory())"
    limited = ["bash", "-c", f"ulimit -v {1 << 20}; exec {sys.executable} -c '{code}'"]
    done = subprocess.run(limited, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert int(done.stdout) == 1024 * MIB


def test_version_1_groups_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text("5:cpu,cpuacct:/slurm\n4:memory:/slurm\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    group(tmp_path / "cg" / "cpu" / "slurm", **{"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"})
    group(tmp_path / "cg" / "cpu", **{"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
    group(tmp_path / "cg" / "memory" / "slurm", **{"memory.limit_in_bytes": "4096", "memory.usage_in_bytes": "96"})
    assert available_cores(tmp_path / "cg", tmp_path / "own") == 3
    assert available_memory(tmp_path / "cg", tmp_path / "own") == 4000


def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    assert available_cores(tmp_path, tmp_path / "none") >= 1
    free = psutil.virtual_memory().available
    assert available_memory(tmp_path, tmp_path / "none") == pytest.approx(free, rel=0.5)
