"""The figures of docs/benchmarks/flows.md: what Prefect adds to a batch, in time and in memory.

    python -m tests.bench.flows overhead --slides 200
    python -m tests.bench.flows memory --slides 1000

`overhead` segments slides of one tile with the default model, once with `run_batch` and once as the flow,
against a server of its own that is up already. `memory` runs the flow over files that workers answer for at once,
so that what is left is Prefect and the flow.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil
from prefect.testing.utilities import prefect_test_harness

from flows import segmenting
from flows.batch import segment_batch as batch_flow
from models.bundle import DEFAULT_BUNDLE
from pipeline.batch.collect import collect_jobs
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.progress import Progress, no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from pipeline.workers.open import open_workers
from tests.slides import PINK, painted, write_slide


class Idle:
    """Workers that have nothing to do, and say now and then how much memory this process has."""

    slides_at_once = 8

    def __init__(self, every: int) -> None:
        self.ended = 0
        self._every = every
        self._start = time.perf_counter()

    def segment(self, job: SlideJob, _output: Path, _progress: Progress) -> SlideResult:
        self.ended += 1
        if self.ended == 1 or self.ended % self._every == 0:
            seconds = time.perf_counter() - self._start
            print(f"  {self.ended:>6} slides  {seconds:7.1f} s  {_memory_mb():6.0f} MB", flush=True)
        return SlideResult(job.path.stem, "done", 0.0, {"gland": 1.0, "other": 2.0}, columns={"tissue_mm2": 3.0})

    def cancel(self) -> None:
        pass


def _memory_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6


@contextmanager
def timed(what: str, slides: int) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what}: {wall:.1f} s ({1000 * wall / slides:.0f} ms per slide), CPU {cpu:.1f} s", flush=True)


def overhead(folder: Path, count: int) -> None:
    slides = folder / "slides"
    slides.mkdir()
    for number in range(count):
        write_slide(slides / f"s{number:05}.svs", painted((224, 224), ((20, 20, 180, 180), PINK)), mpp=1.0)
    with timed("plain", count), open_workers(None, DEFAULT_BUNDLE, SegmentConfig()) as workers:
        results = run_batch(collect_jobs([slides]), folder / "plain", workers, lambda _: no_progress, lambda _: None)
    assert {result.status for result in results} == {"done"}
    with prefect_test_harness(server_startup_timeout=120):
        with timed("flow", count):
            assert batch_flow(str(slides), str(folder / "flow"), return_state=True).is_completed()
        with timed("flow, all finished", count):
            assert (
                batch_flow(str(slides), str(folder / "flow"), return_state=True).message
                == f"{count} slides: {count} skipped"
            )


def memory(folder: Path, count: int) -> None:
    slides = folder / "slides"
    slides.mkdir()
    for number in range(count):
        (slides / f"s{number:06}.svs").touch()

    @contextmanager
    def idle(*_: object, **__: object) -> Iterator[Idle]:
        yield Idle(every=max(1, count // 10))

    with prefect_test_harness(server_startup_timeout=120), mock.patch.object(segmenting, "open_workers", idle):
        with timed("flow of nothing", count):
            assert batch_flow(str(slides), str(folder / "out"), return_state=True).is_completed()
        print(f"at the end: {_memory_mb():.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "memory"))
    parser.add_argument("--slides", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"overhead": overhead, "memory": memory}[options.what](Path(folder), options.slides)


if __name__ == "__main__":
    main()
