"""Segments one slide in this process and prints what it took, as JSON: the fresh process of a benchmark.

    python -m tests.bench.one_run SLIDE OUTPUT MODEL SETTINGS

SETTINGS are fields of `SegmentConfig` as JSON. Times count from the start of the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def since_start_s() -> float:
    """Seconds since the kernel started this process, imports of Python itself included."""
    if Path("/proc/self/stat").exists():
        # Not psutil: it adds to the time that the machine started, which Linux tells in whole seconds.
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    import psutil

    return time.time() - float(psutil.Process().create_time())


def peak_bytes() -> int:
    """Most memory that this process ever held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux that one begins with the size of the process that called exec.
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def segment(path: Path, output: Path, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Do what `wsi-segment` does for one slide, and tell when what was ready."""
    times = {"python_s": since_start_s()}
    from pipeline.config import SegmentConfig
    from pipeline.workers.base import SlideJob
    from pipeline.workers.malloc import keep_freed_memory
    from pipeline.workers.open import open_workers

    times["imports_s"] = since_start_s()
    config = SegmentConfig(**settings)
    keep_freed_memory()
    job = SlideJob(path)

    def progress(stage: str, done: int, total: int) -> None:
        del total
        if stage == "segmenting":
            times.setdefault("first_block_begun_s" if done == 0 else "first_block_s", since_start_s())

    with open_workers(None, model, config, first=job) as workers:
        times["model_s"] = since_start_s()
        started_bytes = peak_bytes()
        begun = time.perf_counter()
        result = workers.segment(job, output, progress)
        segment_s = time.perf_counter() - begun
    cpu = os.times()
    return {
        "status": result.status,
        "times": times,
        "segment_s": segment_s,
        "cpu_s": cpu.user + cpu.system,
        "system_s": cpu.system,
        "started_bytes": started_bytes,
        "peak_bytes": peak_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(segment(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))))
