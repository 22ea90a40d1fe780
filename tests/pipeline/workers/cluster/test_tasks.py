"""What a task reports to the process that waits for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config import SegmentConfig, resolve
from pipeline.errors import Cancelled, ClusterError
from pipeline.workers.cluster import tasks
from pipeline.workers.cluster.tasks import ModelRef, TaskContext, check_computation
from tests.pipeline.fakes import CPU


class FakeTask:
    """A task that the scheduler cancels while it runs, or does not cancel."""

    def __init__(self, *, cancelled: bool) -> None:
        self.cancelled = cancelled
        self.sent: list[str] = []

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, kind: str, **_: object) -> None:
        self.sent.append(kind)


@pytest.mark.parametrize(("cancelled", "sent"), [(False, ["started", "ended"]), (True, ["started"])])
def test_a_task_that_the_scheduler_took_back_reports_no_end(
    monkeypatch: pytest.MonkeyPatch, cancelled: bool, sent: list[str]
) -> None:
    task = FakeTask(cancelled=cancelled)
    monkeypatch.setattr(tasks, "_RunningTask", lambda _: task)

    def work(_: Any) -> object:
        raise Cancelled("the task was cancelled")

    tasks._run(TaskContext("id", "topic", ModelRef("model", "digest"), SegmentConfig()), work)
    assert task.sent == sent


def test_a_band_is_not_computed_in_another_way_than_its_slide() -> None:
    asked = resolve(SegmentConfig(num_workers=1), CPU)
    check_computation(asked, resolve(SegmentConfig(num_workers=7), CPU), "a.svs")
    for change, message in {"threads": "threads 2 instead of 1", "processor": "processor other instead of any"}.items():
        own = replace(CPU, threads=2) if change == "threads" else replace(CPU, processor="other")
        with pytest.raises(ClusterError, match=rf"a\.svs: a worker computes with {message}, .*--spread slides"):
            check_computation(asked, resolve(SegmentConfig(), own), "a.svs")
    # OpenVINO returns the same bits with any number of threads.
    first, second = (replace(CPU, runtime="openvino", threads=threads) for threads in (1, 2))
    check_computation(resolve(SegmentConfig(), first), resolve(SegmentConfig(), second), "a.svs")
