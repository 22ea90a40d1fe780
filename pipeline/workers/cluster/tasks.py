"""The tasks that run in the processes of a cluster: a slide, a band of a slide's blocks, and checks before both.

Tasks are small. They contain the names of files but no pixels, and their results are on the shared disk.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import time
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from distributed import Worker, get_worker
from distributed.utils import sync

from models.bundle import load_bundle
from models.predictor import Predictor
from models.runtimes import Runtime
from pipeline.config import ResolvedSettings, SegmentConfig, resolve
from pipeline.console import silence_tifffile
from pipeline.errors import Cancelled, ClusterError, OutputError
from pipeline.files import disk_shortage
from pipeline.results.record import installed_versions, versions
from pipeline.results.slide_result import SlideResult
from pipeline.slide.blocks import BlockRecord, BlockWork
from pipeline.slide.engine import run_blocks
from pipeline.slide.recipe import segment_slide
from pipeline.workers.in_process import load_predictor, predictor_settings
from pipeline.workers.malloc import keep_freed_memory
from pipeline.workers.outcome import Outcome
from wsi.errors import WsiSegmentError, with_causes
from wsi.grid import Block
from wsi.slide import Slide

log = logging.getLogger(__name__)


PROGRESS_S = 0.5
"""Minimum number of seconds between two progress messages of one stage."""

ANSWER_S = 30.0
"""Timeout of a check, in seconds. A process that reads from a stale mount hangs."""


@dataclass(frozen=True)
class ModelRef:
    """A model that another process can load."""

    name: str
    """Name of a shipped bundle, or absolute path of a bundle."""
    digest: str


@dataclass(frozen=True)
class TaskContext:
    """The values that all tasks of one slide share."""

    id: str
    topic: str
    """The Dask topic of messages such as {"id": …, "key": …, "worker": …, "kind": "started"}.

    A message of kind "progress" also has the values of the callback, and a message of kind "ended" a pickled `Outcome`.
    """
    model: ModelRef
    config: SegmentConfig


@dataclass(frozen=True)
class Band:
    """Some blocks of one slide, and the values that they share."""

    work: bytes
    """The `BlockWork`, pickled and compressed: the layers of its tissue have millions of pixels, which repeat."""
    identity: bytes
    """Content of the working folder's identity.json. If the file differs, another run has taken the folder."""
    versions: Mapping[str, str]
    """The versions of the client, which the result states for all blocks."""
    blocks: tuple[Block, ...]


def make_band(work: BlockWork, blocks: Sequence[Block]) -> Band:
    """Return a band of blocks for another process."""
    return Band(
        work=zlib.compress(pickle.dumps(work), 1),
        identity=(work.folder / "identity.json").read_bytes(),
        versions=versions(work.settings.runtime),
        blocks=tuple(blocks),
    )


def check_worker(needs: dict[str, str], model: ModelRef) -> str:
    """Return why this process cannot run tasks: other versions or another model. An empty text means that it can."""
    have = installed_versions()
    # A process without OpenVINO computes with PyTorch.
    if other := _other_versions({name: need for name, need in needs.items() if name in have}, have):
        return f"has {other}; install the same versions everywhere"
    try:
        _check_digest(model)
    except WsiSegmentError as error:
        return f"cannot use the model: {error}"
    return ""


def check_folder(probe: Path, content: str) -> str:
    """Return why this process cannot write to the folder of the client's file `probe`, or an empty text.

    It writes a file of its own, because a folder can be mounted read-only here.
    """
    try:
        if probe.read_text(encoding="utf-8") != content:
            return "has another folder at this path; mount the same folder there"
    except OSError as error:
        return f"does not see the folder ({error.strerror or error}); mount it there, at the same path"
    own = probe.with_name(f".{uuid.uuid4()}.probe")
    try:
        own.write_text(content, encoding="utf-8")
        own.unlink()
    except OSError as error:
        with suppress(OSError):
            own.unlink()
        reason = disk_shortage(error, probe.parent) or (
            f"{error.strerror or error}; mount the folder read-write, and run the worker as a user who may write there"
        )
        return f"cannot write to the folder: {reason}"
    return ""


def check_slide(path: Path) -> str:
    """Return why this process cannot read a slide that the client can read, or an empty text."""
    try:
        with path.open("rb"):
            return ""
    except OSError as error:
        return f"cannot read the slide there ({error.strerror or error}); mount the folder there, at the same path"


async def answer(question: Callable[..., str], *arguments: object) -> str:
    """Return the answer to one of the checks above, or a text about its timeout."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(question, *arguments), ANSWER_S)
    except TimeoutError:
        return f"has not answered within {ANSWER_S:g} s; a mount may be stale"


def segment_slide_task(context: TaskContext, path: Path, output: Path, name: str) -> None:
    """Segment a slide into `output/<name>` and send its SlideResult to the topic."""
    _run(context, lambda task: _segment_slide(context, path, output, name, task))


def segment_band_task(context: TaskContext, band: Band) -> None:
    """Segment a band and send the records of its blocks, whose files are on the disk, and the device to the topic."""
    _run(context, lambda task: _segment_band(context, band, task))


def resolve_task(context: TaskContext) -> None:
    """Resolve the settings in a process that has the device and send the ResolvedSettings to the topic."""
    _run(context, lambda _: resolve(context.config, _predictor(context).compute))


def _segment_slide(context: TaskContext, path: Path, output: Path, name: str, task: _RunningTask) -> SlideResult:
    if not output.is_dir():
        raise ClusterError(
            f"{path.name}: worker {get_worker().address} does not see the folder {output}; mount it there, at the same "
            f"path"
        )
    predictor = _predictor(context)
    with _write_errors_name_the_worker():
        return segment_slide(path, output, predictor, context.config, _reporter(task), name=name)


def _segment_band(context: TaskContext, band: Band, task: _RunningTask) -> tuple[list[BlockRecord], str]:
    predictor, work = _predictor(context), work_of(band)
    records: list[BlockRecord] = []
    stop = threading.Event()

    def stopped() -> bool:
        return stop.is_set() or task.is_cancelled() or not _is_ours(work, band)

    check_computation(work.settings, resolve(context.config, predictor.compute), work.info.path.name)
    check_versions(band.versions, work.info.path.name)
    if not _is_ours(work, band):
        raise ClusterError(
            f"{work.info.path.name}: worker {get_worker().address} does not see the folder {work.folder}, or another "
            f"run has taken it over; mount it there, at the same path"
        )
    with Slide(work.info) as slide, _write_errors_name_the_worker():
        run_blocks(work, slide, predictor, band.blocks, records.append, stop, stopped)
    return records, str(predictor.device)


@contextmanager
def _write_errors_name_the_worker() -> Iterator[None]:
    """Add the address of this process to write errors: a folder or disk can be faulty on one machine alone."""
    try:
        yield
    except OSError as error:  # of a band; the client turns it into an OutputError
        if error.errno is None:
            raise
        named = f"{error.strerror} on worker {get_worker().address}"
        raise OSError(error.errno, named, error.filename) from error
    except OutputError as error:
        if not any(isinstance(one, OSError) for one in with_causes(error)):
            raise
        raise OutputError(f"{error} (on worker {get_worker().address})") from error


def check_computation(asked: ResolvedSettings, own: ResolvedSettings, name: str) -> None:
    """Raise ClusterError if this process would compute blocks in another way than the slide requests."""
    first, here = asked.computed_with(), own.computed_with()
    other = [key for key in first | here if here.get(key) != first.get(key)]
    if other:
        values = ", ".join(f"{key} {here.get(key)} instead of {first.get(key)}" for key in other)
        raise ClusterError(
            f"{name}: a worker computes with {values}, and blocks that are computed in different ways must not be "
            f"mixed in one result; use equal machines with the same OMP_NUM_THREADS, or --spread slides"
        )


def check_versions(needs: Mapping[str, str], name: str) -> None:
    """Raise ClusterError if this process has other versions than the slide's other blocks are computed with.

    `check_worker` asks only the processes that are present when a batch begins.
    """
    if other := _other_versions(needs, installed_versions()):
        raise ClusterError(
            f"{name}: a worker has {other}, and blocks of different versions must not be mixed in one result; install "
            f"the same versions everywhere"
        )


def _other_versions(needs: Mapping[str, str], have: Mapping[str, str]) -> str:
    """Return which versions differ, as "zarr 3.0 instead of 3.1". A CUDA build and a CPU build are equivalent."""
    return ", ".join(
        f"{name} {have.get(name)} instead of {need}"
        for name, need in needs.items()
        if _plain(have.get(name, "")) != _plain(need)
    )


def _is_ours(work: BlockWork, band: Band) -> bool:
    """Return whether the working folder still belongs to the run that sent the band. Its client may have exited."""
    try:
        return (work.folder / "identity.json").read_bytes() == band.identity
    except OSError:
        return False


def work_of(band: Band) -> BlockWork:
    """Return what `make_band` packed."""
    work: BlockWork = pickle.loads(zlib.decompress(band.work))  # noqa: S301 - our own client's
    return work


class _RunningTask:
    """A task that runs in this process."""

    def __init__(self, context: TaskContext) -> None:
        self._context = context
        self._worker: Worker = get_worker()
        self._key = self._worker.get_current_task()

    def is_cancelled(self) -> bool:
        """Return whether the client no longer waits for the task."""
        task = self._worker.state.tasks.get(self._key)
        return task is None or task.state in ("cancelled", "released", "forgotten")

    def send(self, kind: str, **facts: object) -> None:
        """Send a message and wait until the scheduler has received it.

        Messages arrive in order and before Dask's own messages about the task. Raises Cancelled if the scheduler is
        unreachable.
        """
        message = {"id": self._context.id, "key": self._key, "kind": kind, "worker": self._worker.address} | facts
        try:
            sync(self._worker.loop, self._worker.scheduler.log_event, topic=self._context.topic, msg=message)
        except (OSError, RuntimeError) as error:  # a closing worker raises RuntimeError
            raise Cancelled("the scheduler is unreachable") from error


_busy = threading.Lock()


def _run(context: TaskContext, work: Callable[[_RunningTask], object]) -> None:
    """Run a task when no other task runs in this process, which may have several threads for tasks.

    The task itself reports its start and its end. Dask loses the state of a task with its process, and does not record
    which task a process died of.
    """
    task = _RunningTask(context)
    while not _busy.acquire(timeout=1.0):
        if task.is_cancelled():
            return
    try:
        keep_freed_memory()
        silence_tifffile()
        task.send("started")
        outcome = _outcome(work, task)
        # The scheduler may have given the task to another process, which reports its end. This end is `Cancelled`,
        # and the client would cancel the whole batch.
        if not task.is_cancelled():
            task.send("ended", ended=pickle.dumps(outcome))
    finally:
        _busy.release()


def _outcome(work: Callable[[_RunningTask], object], task: _RunningTask) -> Outcome[object]:
    try:
        return Outcome(work(task))
    except Exception as error:
        # If the task is cancelled, the client may have removed the working folder.
        if not isinstance(error, WsiSegmentError) and not task.is_cancelled():
            log.exception("a task failed")
            error.add_note("".join(traceback.format_exception(error)))
        return Outcome.failed(error)


def _reporter(task: _RunningTask) -> Callable[[str, int, int], None]:
    """Return a progress callback that limits the number of messages and raises Cancelled if the task is cancelled."""
    last_stage, last_time = "", 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_time
        if task.is_cancelled():
            raise Cancelled("the client no longer waits for the task")
        now = time.monotonic()
        if stage != last_stage or done == total or now - last_time >= PROGRESS_S:
            last_stage, last_time = stage, now
            task.send("progress", stage=stage, done=done, total=total)

    return report


_predictors: dict[tuple[object, ...], Predictor] = {}


def _predictor(context: TaskContext) -> Predictor:
    """Return the networks. They are loaded once and kept until the process ends."""
    key = _key(context.model, context.config)
    if key not in _predictors:
        _check_digest(context.model)
        predictor = load_predictor(context.model.name, context.config)
        keep_freed_memory(predictor.runtime)
        named = with_runtime(context.config, predictor.runtime)
        _predictors[key] = _predictors[_key(context.model, named)] = predictor
    return _predictors[key]


def _key(model: ModelRef, config: SegmentConfig) -> tuple[object, ...]:
    return (model, *predictor_settings(config).values())


def with_runtime(config: SegmentConfig, runtime: Runtime) -> SegmentConfig:
    """Return settings that request this runtime, and its device if the runtime has only one.

    The device may stay "auto", because each process has its own.
    """
    return replace(config, runtime=runtime, device="cpu" if runtime == "openvino" else config.device)


def _check_digest(model: ModelRef) -> None:
    digest = load_bundle(model.name).digest
    if digest != model.digest:
        raise ClusterError(
            f"model {model.name}: a different model is installed here (digest {digest[:12]} instead of "
            f"{model.digest[:12]}); install the same model everywhere"
        )


def _plain(version: str) -> str:
    return version.partition("+")[0]
