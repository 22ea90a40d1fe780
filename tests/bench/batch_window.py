"""The makespan of a large batch: the real `SlideQueue` on a virtual clock, with simulated durations.

    python -m tests.bench.batch_window --slides 100000 --workers 200
    python -m tests.bench.batch_window --threads 500

The first command prints the makespan divided by the ideal, which is the larger of all work divided by the workers and
the longest slide, and the same for parts of 500 slides with at most 64 slides in flight, as the flow worked before.
Durations are lognormal; one attempt in a hundred fails transiently half-way and is retried. The second command measures
the memory and the processor time of threads that wait for slides.
"""

from __future__ import annotations

import argparse
import heapq
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from pipeline.batch.attempt import Attempt
from pipeline.batch.slots import ThreadSlots
from pipeline.batch.window import QueuedSlide, SlideQueue
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob

OLD_PART, OLD_WINDOW = 500, 64


class VirtualSlots:
    """Slots whose attempts take no time: the clock jumps from one end of an attempt to the next."""

    def __init__(self, attempt: Callable[[QueuedSlide], tuple[float, Attempt]]) -> None:
        """`attempt` returns the seconds and the outcome of an attempt at a slide."""
        self.running = 0
        self._attempt = attempt
        self._now = 0.0
        self._ends: list[tuple[float, QueuedSlide, Attempt]] = []

    def now(self) -> float:
        return self._now

    def start(self, slide: QueuedSlide) -> None:
        seconds, attempt = self._attempt(slide)
        heapq.heappush(self._ends, (self._now + seconds, slide, slide.settle(attempt)))
        self.running += 1

    def wait(self, timeout_s: float) -> tuple[QueuedSlide, Attempt] | None:
        if not self._ends or self._ends[0][0] > self._now + timeout_s:
            self._now += timeout_s
            return None
        self._now, slide, attempt = heapq.heappop(self._ends)
        self.running -= 1
        return slide, attempt


class SimulatedSlides:
    """Slides with lognormal durations, of which some fail transiently."""

    def __init__(self, count: int, mean_s: float, sigma: float, transient_share: float, seed: int) -> None:
        self._random = random.Random(seed)
        # The mean of a lognormal distribution is exp(mu + sigma² / 2).
        mu = math.log(mean_s) - sigma**2 / 2
        self.durations_s = [self._random.lognormvariate(mu, sigma) for _ in range(count)]
        self.work_s = 0.0
        self._transient_share = transient_share

    def queued(self) -> list[QueuedSlide]:
        return [QueuedSlide(0.0, number, SlideJob(Path(f"s{number}.svs"))) for number in range(len(self.durations_s))]

    def attempt(self, slide: QueuedSlide) -> tuple[float, Attempt]:
        seconds, fails = self.durations_s[slide.number], self._random.random() < self._transient_share
        seconds *= 0.5 if fails else 1.0
        self.work_s += seconds
        result = SlideResult(slide.job.path.stem, "failed" if fails else "done", seconds)
        return seconds, Attempt(result, "transient" if fails else "final")


def makespan_s(slides: Sequence[QueuedSlide], simulated: SimulatedSlides, at_once: int) -> float:
    """Return the virtual time that the real queue takes for these slides."""
    slots = VirtualSlots(simulated.attempt)
    ended = sum(one is not None for one in SlideQueue(slides, slots, lambda: at_once, lambda _: False))
    assert ended == len(slides)
    return slots.now()


def window_ratio(simulated: SimulatedSlides, workers: int) -> tuple[float, float]:
    """Return the makespan of one window as wide as the workers, in seconds and divided by the ideal."""
    simulated.work_s = 0.0
    seconds = makespan_s(simulated.queued(), simulated, workers)
    return seconds, seconds / ideal_s(simulated, workers)


def parts_ratio(simulated: SimulatedSlides, workers: int) -> tuple[float, float]:
    """Return the same for parts that wait for their slowest slide, with at most `OLD_WINDOW` slides in flight."""
    simulated.work_s = 0.0
    queued = simulated.queued()
    parts = [queued[first : first + OLD_PART] for first in range(0, len(queued), OLD_PART)]
    seconds = sum(makespan_s(part, simulated, min(OLD_WINDOW, workers)) for part in parts)
    return seconds, seconds / ideal_s(simulated, workers)


def ideal_s(simulated: SimulatedSlides, workers: int) -> float:
    """Return a lower bound of the makespan."""
    longest_s = max(simulated.durations_s)
    return max(simulated.work_s / workers, longest_s)


def measure_threads(count: int, seconds: float = 5.0) -> None:
    """Print what threads that wait for slides cost: waiting for one event, and polling as `SlideTasks` does."""
    for what, wait in (("one event", None), ("polling every second", 1.0), ("polling every 0.1 s", 0.1)):
        done, process = threading.Event(), psutil.Process()
        memory, start = process.memory_info().rss, process.cpu_times()
        with ThreadSlots(waiting(done, wait)) as slots:
            for slide in SimulatedSlides(count, 1.0, 1.0, 0.0, 0).queued():
                slots.start(slide)
            time.sleep(seconds)
            now = process.cpu_times()
            share = (now.user + now.system - start.user - start.system) / seconds
            grown = (process.memory_info().rss - memory) / count / 1e3
            print(f"{count} threads, {what}: {grown:.0f} KB each, {share:.1%} of a core", flush=True)
            done.set()


def waiting(done: threading.Event, poll_s: float | None) -> Callable[[QueuedSlide], Attempt]:
    def attempt(slide: QueuedSlide) -> Attempt:
        while not done.wait(poll_s):
            pass
        return Attempt(SlideResult(slide.job.path.stem, "done", 0.0))

    return attempt


def lines(options: argparse.Namespace) -> Iterator[str]:
    simulated = SimulatedSlides(options.slides, options.mean_s, options.sigma, options.transient_share, options.seed)
    longest_s = max(simulated.durations_s)
    yield (
        f"{options.slides:,} slides, {options.workers} workers: mean {options.mean_s:g} s, longest {longest_s:,.0f} s"
    )
    start = time.perf_counter()
    for what, ratio in (("one window", window_ratio), (f"parts of {OLD_PART}, {OLD_WINDOW} in flight", parts_ratio)):
        seconds, share = ratio(simulated, options.workers)
        yield f"{what}: makespan {seconds / 3600:.2f} h, {share:.3f} of ideal"
    yield f"the simulation took {time.perf_counter() - start:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--mean-s", type=float, default=42.5)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the durations")
    parser.add_argument("--transient-share", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="measure so many waiting threads instead")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.threads:
        measure_threads(options.threads)
        return
    for line in lines(options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
