"""The tasks of one slide on a cluster: submit them, wait for them and cancel them."""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
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
from pipeline.workers.cluster.available import AvailableProcesses
from pipeline.workers.outcome import Outcome

log = logging.getLogger(__name__)

RESTART_S = 30.0
"""Timeout of a process restart, in seconds."""

QUEUED_TRIES = 3
"""Times a task is resubmitted if it was only queued in processes that died."""

Usable = Callable[[str, Exception | None], bool]
"""Returns whether the process at an address can run a slide's tasks, before a task or after the error of a task."""


@dataclass(frozen=True)
class Message:
    """An event of a slide's tasks."""

    kind: str
    """"started", "progress" or "ended" from a process; "released" when Dask drops a task; "cancelled"."""
    facts: Mapping[str, Any]


@dataclass
class _Task:
    """A submitted task."""

    future: Future[Any]
    function: Callable[..., None]
    arguments: tuple[object, ...]
    tries: int
    allowed: Sequence[str] | None
    """Addresses of the processes that may run the task. None: all."""
    address: str = ""
    """Address of the process that started the task last."""
    starts: int = 0
    """Number of times a process has started the task."""


class SlideTasks:
    """The tasks of one slide. One thread submits tasks and waits; other threads call `cancel` and `receive`."""

    def __init__(
        self,
        name: str,
        client: Client,
        available: AvailableProcesses,
        timeout_s: float | None,
        progress: Progress,
        usable: Usable,
    ) -> None:
        """A task moves to another process if `usable` returns False for its process."""
        self.id = str(uuid.uuid4())
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._name = name
        self._client = client
        self._available = available
        self._timeout_s = timeout_s
        self._progress = progress
        self._cancelled = threading.Event()
        self._tasks: dict[str, _Task] = {}
        self._usable = usable
        self._deadline: float | None = None

    @property
    def running(self) -> int:
        """Return the number of unfinished tasks."""
        return len(self._tasks)

    def receive(self, message: Message) -> None:
        """Take a message about a task. The client calls this on its own thread, so it must not block."""
        self._messages.put(message)

    def submit(self, function: Callable[..., None], *arguments: object) -> None:
        """Submit a task. Raises WorkerLostError if the cluster is unreachable."""
        self._submit(function, arguments, tries=1)

    def _submit(self, function: Callable[..., None], arguments: tuple[object, ...], tries: int) -> None:
        # No slide names in keys, because the cluster's dashboard and logs show them.
        key = f"{function.__name__}-{uuid.uuid4()}"
        resources, allowed = dict(self._available.resources), self._available.allowed()
        try:
            future = self._client.submit(
                function, *arguments, key=key, pure=False, resources=resources, workers=allowed
            )
        except Exception as error:
            raise self._lost() from error
        self._tasks[key] = _Task(future, function, arguments, tries, allowed)
        # The messages of the task arrive earlier, because they take the same way.
        future.add_done_callback(lambda _: self._messages.put(Message("released", {"key": key})))

    def next_ended(self) -> Any:
        """Wait for the next task to end and report progress meanwhile. Return the task's value or raise its error.

        Raises Cancelled, SlideTimeoutError, WorkerLostError if the cluster becomes unreachable, WorkerCrashedError if
        several processes died while they ran the task, and ClusterError if the task could not run.
        """
        while True:
            self._check()
            try:
                message = self._messages.get(timeout=1.0 if self._deadline is None else 0.1)
            except queue.Empty:
                self._move_stranded()
                continue
            key = message.facts.get("key", "")
            task = self._tasks.get(key)
            if task is None:
                continue
            if message.kind == "started":
                task.address = message.facts["worker"]
                if not self._usable(task.address, None):
                    self._move(key)
                    continue
                task.starts += 1
                if self._timeout_s is not None and self._deadline is None:
                    self._deadline = time.monotonic() + self._timeout_s
            elif message.kind == "progress":
                self._progress(message.facts["stage"], message.facts["done"], message.facts["total"])
            else:
                if message.kind == "ended":
                    ended: Outcome[Any] = pickle.loads(message.facts["ended"])  # noqa: S301 - our own task's
                    if ended.error is not None and not self._usable(task.address, ended.error):
                        self._move(key)
                        continue
                    del self._tasks[key]
                    return ended.result()
                del self._tasks[key]
                if not _was_queued(task):
                    self._fail(task.future)
                self._submit(task.function, task.arguments, task.tries + 1)

    def _move(self, key: str) -> None:
        """Submit a task again, which another process will run."""
        task = self._tasks.pop(key)
        task.future.cancel(force=True, msg="moved to another process")
        self._submit(task.function, task.arguments, task.tries)

    def _move_stranded(self) -> None:
        """Submit the tasks again whose allowed processes have all left."""
        present = set(self._available.addresses())
        for key, task in list(self._tasks.items()):
            if task.allowed is not None and present.isdisjoint(task.allowed):
                self._move(key)

    def report(self, stage: str, done: int, total: int) -> None:
        """Report progress of work in this process. Raises Cancelled and SlideTimeoutError, as `next_ended` does."""
        self._check()
        self._progress(stage, done, total)

    def cancel(self) -> None:
        """Make the waiting thread raise Cancelled."""
        self._cancelled.set()
        self._messages.put(Message("cancelled", {}))

    def release(self) -> None:
        """Cancel the unfinished tasks. They stop at their next step."""
        for task in self._tasks.values():
            task.future.cancel(force=True, msg="no longer needed")
        self._tasks.clear()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"{self._name}: interrupted; run the same command again to resume from the finished blocks")
        late = self._deadline is not None and time.monotonic() > self._deadline
        if late and self._timeout_s is not None:
            self._kill_processes()
            raise SlideTimeoutError.after(self._name, self._timeout_s)

    def _kill_processes(self) -> None:
        """Kill the processes that run the slide's tasks. A read that hangs cannot be stopped in another way."""
        busy = {task.address for task in self._tasks.values() if task.address}
        self.release()
        try:
            self._client.restart_workers(sorted(busy), timeout=RESTART_S, raise_for_error=False)
        except ValueError as error:  # no nanny
            log.warning("%s: its process cannot be killed (%s); the task stops at its next step", self._name, error)
        except (OSError, TimeoutError) as error:
            log.warning("%s: its process was not killed: %s", self._name, error)

    def _fail(self, future: Future[Any]) -> NoReturn:
        """Raise the error of a task that did not send one."""
        if future.status != "error":
            raise self._lost()
        error = future.exception()
        if isinstance(error, KilledWorker):
            raise WorkerCrashedError(
                f"{self._name}: every process that ran it died ({error.allowed_failures + 1} processes), most likely "
                f"because memory ran out; lower --num-workers or --batch-size and pass --retry-failed"
            ) from error
        raise ClusterError(
            f"{self._name}: the cluster could not run it ({type(error).__name__}: {error}); install the same versions "
            f"everywhere"
        ) from error

    def _lost(self) -> PipelineError:
        if self._client.status in ("closing", "closed"):
            # The client has disconnected from the scheduler, so a retry cannot help.
            return ClusterError(
                f"{self._name}: the connection to the scheduler is lost; start the batch again to resume"
            )
        return WorkerLostError(
            f"{self._name}: the connection to the cluster is lost; run the same command again to resume from the "
            f"finished blocks"
        )


def _was_queued(task: _Task) -> bool:
    """Return whether a task failed although it was only queued, behind another task, in a process that died.

    Dask counts every process that dies while a task is assigned to it, even if the process never started the task.
    """
    if task.future.status != "error" or task.tries > QUEUED_TRIES:
        return False
    error = task.future.exception()
    return isinstance(error, KilledWorker) and task.starts <= error.allowed_failures
