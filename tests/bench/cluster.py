"""What processes of our own cost against this process: `python -m tests.bench.cluster SLIDE [local:N ...]`.

Prints, per scheduler and spread, the seconds to start, for one slide, and to end; and whether the arrays and polygons
are the same bytes as in this process.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

from pipeline.config import SegmentConfig
from pipeline.progress import no_progress
from pipeline.workers.base import SlideJob, Spread
from pipeline.workers.open import open_workers


def measure(slide: Path, output: Path, scheduler: str | None, spread: Spread) -> tuple[list[float], dict[str, bytes]]:
    """Seconds to start, to segment and to end; and the files of the result that tell no times."""
    times = [time.perf_counter()]
    with open_workers(scheduler, "colon-gland", SegmentConfig(device="cpu", block_out=128), spread=spread) as workers:
        times.append(time.perf_counter())
        result = workers.segment(SlideJob(slide), output, no_progress)
        times.append(time.perf_counter())
    times.append(time.perf_counter())
    assert result.folder is not None
    kept = (p for p in result.folder.rglob("*") if p.is_file() and p.name not in ("run.json", "index.html"))
    files = {path.relative_to(result.folder).as_posix(): path.read_bytes() for path in kept}
    return [end - start for start, end in itertools.pairwise(times)], files


def main() -> None:
    """Measure this process, then each scheduler in both ways."""
    slide, schedulers = Path(sys.argv[1]), sys.argv[2:] or ["local"]
    spreads: tuple[Spread, Spread] = ("slides", "blocks")
    with tempfile.TemporaryDirectory() as folder:
        seconds, expected = measure(slide, Path(folder) / "here", None, "slides")
        print("in process      ", *(f"{s:7.1f} s" for s in seconds))
        for scheduler in schedulers:
            for spread in spreads:
                seconds, files = measure(slide, Path(folder) / f"{scheduler}-{spread}", scheduler, spread)
                same = "same bytes" if files == expected else "OTHER BYTES"
                print(f"{scheduler:<9}{spread:<7}", *(f"{s:7.1f} s" for s in seconds), same)


if __name__ == "__main__":
    main()
