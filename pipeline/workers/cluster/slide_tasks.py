"""The tasks of one slide on a cluster: handed in, waited for, and ended early where that is asked for."""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from distributed import Client, Future, KilledWorker

from pipeline.errors import (
    Cancelled,
    ClusterError,
    PipelineError,
    SlideTimeoutError,
    WorkerCrashedError,
    WorkerLostError,
)
from pipeline.progress import Progress
from pipeline.workers.outcome import Outcome

log = logging.getLogger(__name__)

RESTART_S = 30.0
"""How long a process that has to be ended may take to come back."""

BYSTANDER_TRIES = 3
"""How often a task is handed in again that was only waiting in processes that were ended."""


@dataclass(frozen=True)
class Message:
    """Something that happened to a slide's tasks."""

    kind: str
    """What a process says: "started", "progress" or "ended"; "left" where Dask has done with a task; "cancelled"."""
    facts: Mapping[str, Any]


@dataclass
class _Task:
    """A task that was handed in."""

    future: Future[Any]
    function: Callable[..., None]
    arguments: tuple[object, ...]
    tries: int
    address: str = ""
    """The process that last began it."""
    begun: int = 0
    """How often a process has begun it."""


class SlideTasks:
    """The tasks of one slide. One thread hands them in and waits; `cancel` and `receive` are for others."""

    def __init__(
        self,
        name: str,
        client: Client,
        resources: Mapping[str, float],
        timeout_s: float | None,
        progress: Progress,
        watch: Callable[[], object],
    ) -> None:
        """`watch` is called now and then while nothing happens."""
        self.id = str(uuid.uuid4())
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._name = name
        self._client = client
        self._resources = dict(resources)
        self._timeout_s = timeout_s
        self._progress = progress
        self._cancelled = threading.Event()
        self._tasks: dict[str, _Task] = {}
        self._watch = watch
        self._deadline: float | None = None

    @property
    def running(self) -> int:
        """Tasks that have not ended."""
        return len(self._tasks)

    def receive(self, message: Message) -> None:
        """Take what a process says of a task. Called on the client's own thread: it must not wait."""
        self._messages.put(message)

    def submit(self, function: Callable[..., None], *arguments: object) -> None:
        """Hand a task in. Raises WorkerLostError where the cluster is gone."""
        self._submit(function, arguments, tries=1)

    def _submit(self, function: Callable[..., None], arguments: tuple[object, ...], tries: int) -> None:
        # No slide names in keys: the cluster's own pages and logs show them.
        key = f"{function.__name__}-{uuid.uuid4()}"
        try:
            future = self._client.submit(function, *arguments, key=key, pure=False, resources=self._resources)
        except Exception as error:
            raise self._lost() from error
        self._tasks[key] = _Task(future, function, arguments, tries)
        # What the task itself says has been received by then: it comes the same way.
        future.add_done_callback(lambda _: self._messages.put(Message("left", {"key": key})))

    def next_ended(self) -> Any:
        """Wait until one of the tasks has ended, passing progress on; returns its value or raises its error.

        Raises Cancelled; SlideTimeoutError; WorkerLostError if the cluster goes away; WorkerCrashedError if the task
        ended several processes; ClusterError if the cluster could not run it.
        """
        while True:
            self._check()
            try:
                message = self._messages.get(timeout=1.0 if self._deadline is None else 0.1)
            except queue.Empty:
                self._watch()
                continue
            task = self._tasks.get(message.facts.get("key", ""))
            if task is None:
                continue
            if message.kind == "started":
                task.address = message.facts["worker"]
                task.begun += 1
                if self._timeout_s is not None and self._deadline is None:
                    self._deadline = time.monotonic() + self._timeout_s
            elif message.kind == "progress":
                self._progress(message.facts["stage"], message.facts["done"], message.facts["total"])
            else:
                del self._tasks[message.facts["key"]]
                if message.kind == "ended":
                    ended: Outcome[Any] = pickle.loads(message.facts["ended"])  # noqa: S301 - our own task's
                    return ended.result()
                if not _is_bystander(task):
                    self._fail(task.future)
                self._submit(task.function, task.arguments, task.tries + 1)

    def tell(self, stage: str, done: int, total: int) -> None:
        """Pass the progress of this process's own work on; raises as `next_ended` does where it should not go on."""
        self._check()
        self._progress(stage, done, total)

    def cancel(self) -> None:
        """Let the waiting thread raise Cancelled."""
        self._cancelled.set()
        self._messages.put(Message("cancelled", {}))

    def release(self) -> None:
        """Let go of the tasks that have not ended; they stop at their next step."""
        for task in self._tasks.values():
            task.future.cancel(force=True, msg="nobody waits for it any more")
        self._tasks.clear()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"{self._name}: interrupted; run the same command again to go on from what is finished")
        late = self._deadline is not None and time.monotonic() > self._deadline
        if late and self._timeout_s is not None:
            self._end_processes()
            raise SlideTimeoutError.after(self._name, self._timeout_s)

    def _end_processes(self) -> None:
        """End the processes that work on the slide: what hangs in a read cannot be stopped otherwise."""
        at_work = {task.address for task in self._tasks.values() if task.address}
        self.release()
        try:
            self._client.restart_workers(sorted(at_work), timeout=RESTART_S, raise_for_error=False)
        except ValueError as error:  # no nanny
            log.warning("%s: its process cannot be ended (%s); it stops at its next step", self._name, error)
        except (OSError, TimeoutError) as error:
            log.warning("%s: its process was not ended: %s", self._name, error)

    def _fail(self, future: Future[Any]) -> NoReturn:
        """Raise why a task ended that could not say so itself."""
        if future.status != "error":
            raise self._lost()
        error = future.exception()
        if isinstance(error, KilledWorker):
            raise WorkerCrashedError(
                f"{self._name}: every process that worked on it was ended ({error.allowed_failures + 1} of them), most "
                f"likely for want of memory; lower --num-workers or --batch-size"
            ) from error
        raise ClusterError(
            f"{self._name}: the cluster could not run it ({type(error).__name__}: {error}); install the same versions "
            f"everywhere"
        ) from error

    def _lost(self) -> PipelineError:
        if self._client.status in ("closing", "closed"):
            # The client has given up on the scheduler: no other try can help.
            return ClusterError(f"{self._name}: the cluster's scheduler went away; start the batch again to go on")
        return WorkerLostError(
            f"{self._name}: the cluster that worked on it went away; run the same command again to go on from the "
            f"finished blocks"
        )


def _is_bystander(task: _Task) -> bool:
    """Whether a task failed only because processes were ended in which it waited for its turn behind another one.

    Dask counts every process that ends while a task is given to it. Only one that had begun it each time is suspect.
    """
    if task.future.status != "error" or task.tries > BYSTANDER_TRIES:
        return False
    error = task.future.exception()
    return isinstance(error, KilledWorker) and task.begun <= error.allowed_failures
