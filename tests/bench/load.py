"""Segments one long batch of small slides and tells what grows with the number of slides.

    nice -n 5 python -m tests.bench.load --slides 500 [--scheduler local:2] [--json FILE]

The slides are a few generated ones under many names. After each slide the memory, file descriptors and threads of this
process and of those it started are noted. Slides whose pixels are the same must have the same map, byte for byte,
whenever in the batch they came.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled
from pipeline.formats.outputs import OUTPUTS
from pipeline.progress import no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from pipeline.workers.open import open_workers
from tests.pipeline.fakes import run_of
from tests.pipeline.small_bundle import small_bundle
from tests.slides import PINK, PURPLE, painted, write_slide

KINDS = 4
"""Slides that differ; all others are one of these under another name."""


@dataclass(frozen=True)
class Sample:
    """What was in use when a slide had ended, by this process and by those it started."""

    elapsed_s: float
    own_bytes: int
    """Resident memory of this process."""
    other_bytes: int
    """Of the processes it started."""
    descriptors: int
    threads: int
    processes: int


@dataclass(frozen=True)
class Load:
    """One batch: a sample after each slide, in the order they ended, and what their run.json say."""

    samples: list[Sample]
    results: list[SlideResult]
    stages: list[dict[str, float]]
    """Seconds per stage of each slide, in the order of `results`; empty for one that failed."""

    def bytes_per_1000_slides(self) -> float:
        """Slope of the memory of all processes over the second half of the batch, by least squares."""
        half = self.samples[len(self.samples) // 2 :]
        total = [sample.own_bytes + sample.other_bytes for sample in half]
        return float(np.polyfit(np.arange(len(half)), total, 1)[0]) * 1000 if len(half) > 1 else 0.0

    def slowest(self) -> list[str]:
        """The slowest hundredth of the slides, and the stage of each that took more than usual."""
        usual: defaultdict[str, list[float]] = defaultdict(list)
        for stages in self.stages:
            for stage, seconds in stages.items():
                usual[stage].append(seconds)
        median_s = float(np.median([result.seconds for result in self.results]))
        order = sorted(range(len(self.results)), key=lambda i: -self.results[i].seconds)
        lines = []
        for i in order[: math.ceil(len(order) / 100)]:
            excess = {stage: seconds - float(np.median(usual[stage])) for stage, seconds in self.stages[i].items()}
            stage = max(excess, key=lambda name: excess[name], default="unknown")
            lines.append(
                f"slide {i + 1}: {self.results[i].seconds:.2f} s (median {median_s:.2f} s); {stage}: "
                f"{excess.get(stage, 0.0):+.2f} s"
            )
        return lines


def write_slides(folder: Path, count: int) -> list[Path]:
    """Write `count` small slides that differ in as many ways as `KINDS`; the same pixels are the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"slide-{number:04d}.svs" for number in range(count)]
    for number, path in enumerate(paths):
        if number >= KINDS:
            path.hardlink_to(paths[number % KINDS])
            continue
        rgb_HWC = painted((192, 176), ((16, 16, 160, 144), PINK), ((48 + 16 * number, 48, 64, 64), PURPLE))
        grain_HW1 = np.random.default_rng(number).integers(-12, 12, (*rgb_HWC.shape[:2], 1))
        write_slide(path, np.clip(rgb_HWC + grain_HW1, 0, 255).astype(np.uint8), mpp=1.0)
    return paths


def sample(begun: float) -> Sample:
    """What is in use now."""
    own = psutil.Process()
    others = [usage for process in own.children(recursive=True) if (usage := _usage(process)) is not None]
    mine = _usage(own)
    assert mine is not None
    return Sample(
        elapsed_s=time.perf_counter() - begun,
        own_bytes=mine[0],
        other_bytes=sum(usage[0] for usage in others),
        descriptors=mine[1] + sum(usage[1] for usage in others),
        threads=mine[2] + sum(usage[2] for usage in others),
        processes=1 + len(others),
    )


def _usage(process: psutil.Process) -> tuple[int, int, int] | None:
    try:
        with process.oneshot():
            return process.memory_info().rss, process.num_fds(), process.num_threads()
    except psutil.NoSuchProcess:
        return None


def load_of_batch(
    slides: Sequence[Path], output: Path, bundle: Path, config: SegmentConfig, scheduler: str | None = None
) -> Load:
    """Segment the slides as one batch, as the command does, and sample after each. Ctrl-C ends it early."""
    samples: list[Sample] = []
    results: list[SlideResult] = []
    begun = time.perf_counter()

    def ended(result: SlideResult) -> None:
        results.append(result)
        samples.append(last := sample(begun))
        if len(samples) % 50 == 0:
            used = (last.own_bytes + last.other_bytes) / 2**20
            print(
                f"{len(samples)} slides: {last.elapsed_s:.0f} s, {used:.0f} MiB, {last.descriptors} descriptors, "
                f"{last.threads} threads, {last.processes} processes",
                file=sys.stderr,
                flush=True,
            )

    with open_workers(scheduler, str(bundle), config) as workers, suppress(Cancelled):
        run_batch([SlideJob(path) for path in slides], output, workers, lambda _: no_progress, ended)
    return Load(samples, results, [_stages(result) for result in results])


def map_digests(slides: Sequence[Path], output: Path) -> dict[int, set[str]]:
    """Digests of the stored maps by the file (its number) that the slides' names stand for: one each, if all is well.

    Of slides that have a result.
    """
    digests: defaultdict[int, set[str]] = defaultdict(set)
    for path in slides:
        chunks = output / path.stem / f"{path.stem}.ome.zarr" / "0"
        if not chunks.exists():
            continue
        digest = hashlib.sha256()
        for chunk in sorted(p for p in chunks.rglob("*") if p.is_file()):
            digest.update(chunk.relative_to(chunks).as_posix().encode() + b"\0" + chunk.read_bytes())
        digests[path.stat().st_ino].add(digest.hexdigest())
    return dict(digests)


def _stages(result: SlideResult) -> dict[str, float]:
    """Return the seconds of each stage of a slide outside its blocks, and of the rest: digest, page, lock and renaming.

    An output written on another thread is listed, but does not reduce the rest.
    """
    if result.folder is None:
        return {}
    seconds: dict[str, float] = run_of(result.folder)["seconds"]
    stages = {name: value for name, value in seconds.items() if ":" not in name and name != "total"}
    following = (value for name, value in stages.items() if name not in OUTPUTS or not OUTPUTS[name].beside)
    return stages | {"digest, page and publishing": result.seconds - sum(following)}


def summary(load: Load) -> dict[str, object]:
    """The figures of a batch in plain values."""
    first, last = load.samples[min(9, len(load.samples) - 1)], load.samples[-1]
    fifth = max(1, len(load.samples) // 5)
    ended_s = [0.0, *(s.elapsed_s for s in load.samples)]
    return {
        "slides": len(load.results),
        "failed": sum(result.status != "done" for result in load.results),
        "seconds": last.elapsed_s,
        "seconds_per_slide_first_fifth": (ended_s[fifth] - ended_s[1]) / max(1, fifth - 1),
        "seconds_per_slide_last_fifth": (ended_s[-1] - ended_s[-1 - fifth]) / fifth,
        "memory_10th_MiB": (first.own_bytes + first.other_bytes) / 2**20,
        "memory_last_MiB": (last.own_bytes + last.other_bytes) / 2**20,
        "memory_MiB_per_1000_slides": load.bytes_per_1000_slides() / 2**20,
        "descriptors_10th": first.descriptors,
        "descriptors_last": last.descriptors,
        "threads_10th": first.threads,
        "threads_last": last.threads,
        "processes": last.processes,
        "slowest": load.slowest(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the batch that the arguments ask for and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    parser.add_argument("--slides", type=int, default=500)
    parser.add_argument("--scheduler", help="local:2 for two processes; in this process, if not given")
    parser.add_argument("--json", type=Path, help="write every sample there, too")
    options = parser.parse_args(arguments)
    from pipeline.workers.malloc import keep_freed_memory

    keep_freed_memory()
    # Ctrl-C prints the figures so far, even if a shell started this in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        slides = write_slides(Path(scratch) / "slides", options.slides)
        bundle = small_bundle(Path(scratch) / "bundle").path
        load = load_of_batch(slides, Path(scratch) / "out", bundle, SegmentConfig(device="cpu"), options.scheduler)
        differing = sum(len(digests) > 1 for digests in map_digests(slides, Path(scratch) / "out").values())
    figures = summary(load) | {"kinds_with_differing_maps": differing, "cores": os.cpu_count()}
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if options.json:
        whole = figures | {"samples": [asdict(s) for s in load.samples], "stages": load.stages}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 1 if figures["failed"] or differing else 0


if __name__ == "__main__":
    sys.exit(main())
