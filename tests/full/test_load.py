"""Nothing grows with the number of slides in one process. `python -m tests.bench.load` measures 500 slides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import theilslopes

from pipeline.results.slide_result import SlideResult
from tests.bench.load import Load, Sample, summary
from tests.repository import REPOSITORY

SLIDES = 30

WARM_UP = 10
"""Slides after which the allocator holds most of what it will hold."""

GROWTH_BYTES = 1 << 20
"""Limit for the growth of memory per slide. One block's map of two classes has 3 MiB."""

ONCE_BYTES = 64 << 20
"""Limit for all growth after the warm-up. The heap grows by 16 to 40 MiB at some slide of some runs."""


def test_descriptors_threads_and_memory_do_not_grow_with_the_slides(tmp_path: Path) -> None:
    # A separate process, because the tests' process is large and keeps freed memory.
    command = [sys.executable, "-m", "tests.bench.load", "--slides", str(SLIDES), "--json", str(tmp_path / "load.json")]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    load = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    assert (load["slides"], load["failed"], load["processes"]) == (SLIDES, 0, 1)
    # The same pixels give the same map under any name, early or late in the batch.
    assert load["kinds_with_differing_maps"] == 0
    tenth, last = load["samples"][WARM_UP - 1], load["samples"][-1]
    assert (last["descriptors"], last["threads"]) == (tenth["descriptors"], tenth["threads"])
    assert growth(np.array([sample["own_bytes"] for sample in load["samples"][WARM_UP:]])) < GROWTH_BYTES
    assert last["own_bytes"] - tenth["own_bytes"] < ONCE_BYTES


def growth(memory: NDArray[np.int64]) -> float:
    """Return the bytes by which the memory grows with each slide: the median slope over all pairs (Theil and Sen).

    What each slide leaves behind shows in every pair. A heap that grows once, by some 20 MiB at any slide, does not.
    """
    return float(theilslopes(memory).slope)


def test_a_leak_is_told_from_a_heap_that_grows_once() -> None:
    noise = np.random.default_rng(0).integers(0, 2 << 20, 30 - WARM_UP)
    once = np.where(np.arange(len(noise)) < 7, 0, 22 << 20)
    leak = np.arange(len(noise)) * (3 << 19)  # 1.5 MiB
    assert growth(noise + once) < GROWTH_BYTES
    assert growth(noise + leak) > GROWTH_BYTES
    assert growth(noise + once + leak) > GROWTH_BYTES


def made_up(seconds: list[float], growth_bytes: int) -> Load:
    """Return a batch whose memory grows by that much with each slide, and whose slides take these times."""
    return Load(
        samples=[Sample(float(n), 100 + n * growth_bytes, 0, 10, 5, 1) for n in range(len(seconds))],
        results=[SlideResult(f"slide-{n}", "done", s) for n, s in enumerate(seconds)],
        stages=[{"plan": 0.5, "blocks": s - 1, "digest, page and publishing": 0.5} for s in seconds],
    )


def test_the_figures_tell_the_slope_of_memory_and_why_the_slowest_slide_was_slow() -> None:
    load = made_up([2.0] * 150 + [5.0] + [2.0] * 49, growth_bytes=3 << 20)
    assert load.bytes_per_1000_slides() == pytest.approx(3000 * 2**20)
    assert load.slowest()[0] == "slide 151: 5.00 s (median 2.00 s); blocks: +3.00 s"
    assert len(load.slowest()) == 2
    figures = summary(load)
    assert (figures["slides"], figures["failed"], figures["descriptors_last"]) == (200, 0, 10)
    assert figures["seconds_per_slide_last_fifth"] == pytest.approx(1.0)
