"""Checks whether the processes of a cluster can run tasks, and leaves out a process that alone cannot."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from distributed import Client

from models.errors import ModelError
from pipeline.config import SegmentConfig
from pipeline.errors import ClusterError
from pipeline.results.record import installed_versions, versions
from pipeline.workers.base import SlideJob
from pipeline.workers.cluster.available import AvailableProcesses
from pipeline.workers.cluster.tasks import ModelRef, answer, check_folder, check_slide, check_worker
from wsi.errors import SlideNotFoundError, with_causes

log = logging.getLogger(__name__)


class WorkerChecks:
    """Asks the processes of a cluster whether they can run tasks. Threads may call this at the same time."""

    def __init__(self, client: Client, available: AvailableProcesses, config: SegmentConfig) -> None:
        self._client = client
        self._available = available
        self._config = config
        # A process with a stale mount delays the checks of other slides, and nothing else.
        self._lock = threading.Lock()
        self._passed: set[str] = set()
        self._folders: set[Path] = set()
        self._slide_folders: set[Path] = set()

    def check_model(self, model: ModelRef) -> None:
        """Check that all present processes have the versions and the model. Raises ClusterError."""
        self._passed.update(self._ask_all(check_worker, self._needs(), model))

    def check_folder(self, output: Path) -> None:
        """Check, once per folder, that all processes write to the same folder as this one. Raises ClusterError."""
        with self._lock:
            if output in self._folders:
                return
            try:
                output.mkdir(parents=True, exist_ok=True)
                with _probe(output) as (probe, content):
                    self._ask_all(check_folder, probe, content)
            except OSError:
                return  # the error of the slide is clearer
            except ClusterError as error:
                raise ClusterError(f"{output}: {error}") from None
            self._folders.add(output)

    def check_slide(self, path: Path) -> None:
        """Check, once per folder of slides, that all processes can read a slide which this one can read.

        Raises ClusterError. After the first folder, a process that alone cannot read a slide is left out instead.
        """
        with self._lock:
            if path.parent in self._slide_folders:
                return
            if check_slide(path):
                return  # the error of the slide is clearer
            try:
                self._ask_all(check_slide, path.absolute(), leave_out=bool(self._slide_folders))
            except ClusterError as error:
                raise ClusterError(f"{path}: {error}") from None
            self._slide_folders.add(path.parent)

    def is_usable(self, address: str, job: SlideJob, output: Path, model: ModelRef, error: Exception | None) -> bool:
        """Return whether a process can run the tasks of a slide. If only others can, it is left out from now on.

        `error` is what a task of the process raised, or None before its task. A process that joined after the start is
        asked before its first task, and every process after an error that its machine can cause.
        """
        others = [one for one in self._available.addresses() if one != address and not self._available.is_left_out(one)]
        if not others:
            return True  # its own errors are clearer, also if only processes are present that are left out
        if self._available.is_left_out(address):
            return False
        doubtful = address not in self._passed if error is None else _can_be_of_the_machine(error)
        if not doubtful:
            return True
        with closing(self._questions(job, output, model)) as questions:
            for question, *arguments in questions:
                reason = self._ask([address], question, *arguments).get(address, "")
                if reason and "" in self._ask(others, question, *arguments).values():
                    self._available.leave_out(address, reason)
                    return False
        self._passed.add(address)
        return True

    def _needs(self) -> dict[str, str]:
        """Return the versions that each process must have."""
        return versions() if self._config.runtime == "torch" else installed_versions()

    def _questions(
        self, job: SlideJob, output: Path, model: ModelRef
    ) -> Generator[tuple[Callable[..., str], *tuple[object, ...]]]:
        yield check_worker, self._needs(), model
        try:
            with _probe(output) as (probe, content):
                yield check_folder, probe, content
        except OSError:
            pass  # this process cannot write either
        if not check_slide(job.path):
            yield check_slide, job.path.absolute()

    def _ask_all(self, question: Callable[..., str], *arguments: object, leave_out: bool = False) -> list[str]:
        """Return the addresses of the processes that can run tasks. Raise ClusterError if one cannot.

        With `leave_out`, processes that cannot are left out, unless no other one can.
        """
        answers = self._ask(self._available.addresses(now=True), question, *arguments)
        usable = [address for address, reason in answers.items() if not reason]
        for address, reason in answers.items():
            if reason and not (leave_out and usable):
                raise ClusterError(f"worker {address} {reason}")
            if reason:
                self._available.leave_out(address, reason)
        return usable

    def _ask(self, addresses: list[str], question: Callable[..., str], *arguments: object) -> dict[str, str]:
        """Return why each process cannot run tasks, or an empty text, without the processes that have exited."""
        answers = self._client.run(answer, question, *arguments, workers=addresses, on_error="return")
        return {
            address: f"cannot run wsi-segment ({type(reason).__name__}: {reason}); install the same versions everywhere"
            if isinstance(reason, Exception)
            else reason
            for address, reason in answers.items()
            if not isinstance(reason, OSError)
        }


@contextmanager
def _probe(output: Path) -> Iterator[tuple[Path, str]]:
    """Write a file whose content other processes can compare, and remove it afterwards. Yield its path and content."""
    path, content = output.absolute() / f".{uuid.uuid4()}.probe", str(uuid.uuid4())
    path.write_text(content, encoding="utf-8")
    try:
        yield path, content
    finally:
        path.unlink(missing_ok=True)


def _can_be_of_the_machine(error: Exception) -> bool:
    return isinstance(error, (ClusterError, ModelError, SlideNotFoundError)) or any(
        isinstance(one, OSError) for one in with_causes(error)
    )
