"""What this process may use of its machine: cores and memory under CPU affinity, control groups and `ulimit -v`.

A container, a Slurm job or a systemd unit sees all cores and all memory of its host, but may use only a part. The files
are those of Linux: cgroups(7), and `cpu.max`, `memory.max`, `memory.high` and `memory.stat` in the kernel's
cgroup-v2.rst.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_cores(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Return how many cores this process may use: at least 1, and a part of a core counts as a core."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS and Windows
        cores = os.cpu_count() or 1
    quotas = [quota for group in _groups("cpu", root, own) if (quota := _cores_of(group)) is not None]
    return max(1, min([cores, *map(math.ceil, quotas)]))


def available_memory(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Return how many bytes of memory this process may take, at most its `ulimit -v`."""
    rests = [_address_space(), *map(_memory_of, _groups("memory", root, own))]
    return max(0, min([int(psutil.virtual_memory().available), *(rest for rest in rests if rest is not None)]))


def _address_space() -> int | None:
    """Return the limit that `ulimit -v` sets, or None.

    What the process has mapped already does not count: libraries and freed memory take more than 1 GB of addresses
    that a run does not need again.
    """
    if sys.platform == "win32":
        return None
    import resource  # does not exist on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else int(limit)


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Yield the folder of this process's control group and those of its parents, whose limits hold too."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2 has one tree
            top = root
        elif controller in controllers.split(","):
            top = root / controller
        else:
            continue
        group = top / path.strip("/")
        while group != top:
            yield group
            group = group.parent
        yield top  # in a container, the root is the container's own group


def _cores_of(group: Path) -> float | None:
    version_1 = _words(group / "cpu.cfs_quota_us", 1) + _words(group / "cpu.cfs_period_us", 1)
    words = _words(group / "cpu.max", 2) or version_1
    if len(words) < 2 or not all(word.isdecimal() for word in words):  # "max", or -1 in version 1
        return None
    return int(words[0]) / max(1, int(words[1]))


def _memory_of(group: Path) -> int | None:
    used = _words(group / "memory.current", 1) or _words(group / "memory.usage_in_bytes", 1)
    if not used or not used[0].isdecimal():
        return None
    # Before the kernel refuses memory, it frees cached files that nothing has read lately. Above memory.high, it
    # refuses nothing and frees all cached files, but then slows the process down until it hardly runs.
    facts = _facts(group)
    unread = facts.get("total_inactive_file", facts.get("inactive_file", 0))
    freed = {"memory.max": unread, "memory.limit_in_bytes": unread, "memory.high": unread + facts.get("active_file", 0)}
    limits = {name: _words(group / name, 1) for name in freed}
    rests = [
        int(words[0]) - max(0, int(used[0]) - freed[name])
        for name, words in limits.items()
        if words and words[0].isdecimal()  # "max" stands for no limit
    ]
    return min(rests, default=None)


def _facts(group: Path) -> dict[str, int]:
    """Return the numbers of a group's `memory.stat`."""
    try:
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdecimal()}


def _words(file: Path, count: int) -> tuple[str, ...]:
    """Return the words of a file, or none if it does not have that many."""
    try:
        words = tuple(file.read_text(encoding="utf-8").split())
    except OSError:
        return ()
    return words if len(words) == count else ()
