"""The queue on a virtual clock: which slide is attempted when."""

from __future__ import annotations

import math
from pathlib import Path

from pipeline.batch.attempt import Attempt
from pipeline.batch.window import RETRY_DELAYS_S, QueuedSlide, SlideQueue
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from tests.bench.batch_window import SimulatedSlides, VirtualSlots, parts_ratio, window_ratio


class Timeline:
    """Slides with scripted attempts, and the virtual times at which their attempts started."""

    def __init__(self, **script: list[tuple[float, str]]) -> None:
        """`script`: for each slide the seconds and the end of each attempt."""
        self.script = script
        self.starts: list[tuple[float, str]] = []
        self.finals: list[tuple[str, str]] = []
        self.locked: set[str] = set()
        self.slots = VirtualSlots(self._attempt)

    def run(self, at_once: int, lock_timeout_s: float = math.inf) -> None:
        slides = [QueuedSlide(0.0, number, SlideJob(Path(f"{name}.svs"))) for number, name in enumerate(self.script)]
        for ended in SlideQueue(slides, self.slots, lambda: at_once, self._is_locked, lock_timeout_s):
            if ended is not None:
                self.finals.append((ended[1].result.slide, ended[1].result.status))

    def _attempt(self, slide: QueuedSlide) -> tuple[float, Attempt]:
        name = slide.job.path.stem
        self.starts.append((round(self.slots.now(), 3), name))
        seconds, end = self.script[name].pop(0)
        result = SlideResult(name, "done" if end == "final" else "failed", seconds)
        assert end in ("final", "transient", "locked")
        return seconds, Attempt(result, end)  # type: ignore[arg-type] # checked above

    def _is_locked(self, job: SlideJob) -> bool:
        return job.path.stem in self.locked


def test_the_window_is_as_wide_as_the_workers_and_waits_for_no_slowest_slide() -> None:
    timeline = Timeline(slow=[(100.0, "final")], **{f"s{n}": [(10.0, "final")] for n in range(10)})
    timeline.run(at_once=2)
    assert timeline.slots.now() == 100
    assert [start for start, _ in timeline.starts] == [0, 0, 10, 20, 30, 40, 50, 60, 70, 80, 90]


def test_the_window_follows_the_number_of_workers_while_it_runs() -> None:
    timeline = Timeline(**{f"s{n}": [(10.0, "final")] for n in range(9)})
    slides = [QueuedSlide(0.0, number, SlideJob(Path(f"{name}.svs"))) for number, name in enumerate(timeline.script)]
    for _ in SlideQueue(slides, timeline.slots, lambda: 1 if timeline.slots.now() < 20 else 4, lambda _: False):
        assert timeline.slots.running <= 4
    assert [start for start, _ in timeline.starts] == [0, 10, 20, 20, 20, 20, 30, 30, 30]


def test_a_transient_failure_is_retried_after_each_delay_and_then_final() -> None:
    timeline = Timeline(a=[(0.0, "transient")] * 4)
    timeline.run(at_once=1)
    assert RETRY_DELAYS_S == (30.0, 120.0, 600.0)
    assert timeline.starts == [(0, "a"), (30, "a"), (150, "a"), (750, "a")]
    assert timeline.finals == [("a", "failed")]


def test_a_slide_that_waits_for_its_retry_holds_no_slot_and_then_comes_first() -> None:
    timeline = Timeline(a=[(1.0, "transient"), (1.0, "final")], **{f"s{n}": [(20.0, "final")] for n in range(4)})
    timeline.run(at_once=1)
    assert timeline.starts == [(0, "a"), (1, "s0"), (21, "s1"), (41, "a"), (42, "s2"), (62, "s3")]


def test_a_locked_slide_is_attempted_when_nothing_else_is_ready_and_its_lock_is_gone() -> None:
    timeline = Timeline(a=[(0.0, "locked"), (5.0, "final")], b=[(10.0, "final")], c=[(30.0, "final")])
    timeline.locked = {"a"}
    slides = [QueuedSlide(0.0, number, SlideJob(Path(f"{name}.svs"))) for number, name in enumerate(timeline.script)]
    for _ in SlideQueue(slides, timeline.slots, lambda: 2, timeline._is_locked):
        if timeline.slots.now() >= 20:
            timeline.locked.clear()
    # One of the two workers is still at "c": a free one is enough.
    assert [name for _, name in timeline.starts] == ["a", "b", "c", "a"]
    assert 20 <= timeline.starts[-1][0] <= 21


def test_a_slide_that_stays_locked_for_longer_than_the_timeout_fails() -> None:
    timeline = Timeline(a=[(0.0, "locked")] * 2, b=[(3.0, "final")])
    timeline.locked = {"a"}
    timeline.run(at_once=1, lock_timeout_s=60.0)
    assert timeline.finals == [("b", "done"), ("a", "failed")]
    assert 60 <= timeline.starts[-1][0] <= 62


def test_a_lock_that_another_run_takes_again_at_once_does_not_make_the_queue_spin() -> None:
    timeline = Timeline(a=[(0.0, "locked")] * 10 + [(1.0, "final")])
    timeline.run(at_once=1)
    assert timeline.finals == [("a", "done")]
    assert timeline.slots.now() >= 10


def test_a_large_batch_takes_at_most_five_percent_longer_than_the_ideal() -> None:
    simulated = SimulatedSlides(20_000, mean_s=42.5, sigma=1.0, transient_share=0.01, seed=0)
    _, share = window_ratio(simulated, workers=100)
    assert share <= 1.05
    _, former = parts_ratio(simulated, workers=100)
    assert former > 2


def test_four_workers_more_than_slides_take_as_long_as_the_longest_slide() -> None:
    simulated = SimulatedSlides(20, mean_s=42.5, sigma=1.0, transient_share=0.0, seed=1)
    seconds, share = window_ratio(simulated, workers=24)
    assert seconds == max(simulated.durations_s)
    assert share == 1
