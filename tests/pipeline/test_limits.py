from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from pipeline.limits import available_cores, available_memory

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
