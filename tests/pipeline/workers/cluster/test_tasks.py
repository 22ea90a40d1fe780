"""What a task reports to the process that waits for it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled
from pipeline.workers.cluster import tasks
from pipeline.workers.cluster.tasks import ModelRef, TaskContext


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
