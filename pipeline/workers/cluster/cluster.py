"""Slides segmented by the processes of a dask.distributed cluster: whole slides, or bands of blocks of one."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client
from distributed.client import ClosedClientError

from models.bundle import ModelCard, load_bundle, shipped_bundles
from pipeline.config import ResolvedSettings, SegmentConfig
from pipeline.errors import ClusterError, ConfigError
from pipeline.progress import Progress
from pipeline.results.record import read_header, versions
from pipeline.results.slide_result import SlideResult
from pipeline.slide.blocks import BlockWork
from pipeline.slide.engine import Finished
from pipeline.slide.recipe import segment_slide_with
from pipeline.workers.base import SlideJob, Spread, job_config
from pipeline.workers.cluster.crew import Crew
from pipeline.workers.cluster.local_processes import own_processes, process_count, visible_gpus
from pipeline.workers.cluster.slide_tasks import Message, SlideTasks
from pipeline.workers.cluster.tasks import (
    ModelRef,
    TaskContext,
    answer,
    check_folder,
    check_worker,
    make_band,
    resolve_there,
    segment_band_there,
    segment_slide_there,
    with_runtime,
)
from wsi.errors import SlideNotFoundError
from wsi.grid import Block
from wsi.slide import Slide

log = logging.getLogger(__name__)

CONNECT_S = 20.0
"""How long a scheduler may take to answer."""

BANDS_PER_WORKER = 2
"""Bands of a slide that a process has been given: one at work, and the next."""

SHARES_PER_WORKER = 4
"""A slide is cut into at least so many bands for each process, so that none is left alone with the last one."""

VISIBLE_S = 60.0
"""How long the files of another machine may take to appear here: network mounts cache what is not there."""

SLIDES_IN_BANDS = 2
"""Slides at once where blocks are spread: the processes have work while the polygons of a slide are joined here."""


@contextmanager
def open_cluster(
    scheduler: str, model: str, config: SegmentConfig, *, spread: Spread, slide_timeout_s: float | None
) -> Iterator[Cluster]:
    """Connect to a cluster, or start processes of our own, and check that they can do the work: see `open_workers`."""
    reference = _model_ref(model)
    with ExitStack() as stack:
        stack.enter_context(_quiet_library())
        own = scheduler.partition(":")[0] == "local"
        client = stack.enter_context(_own_client(scheduler, config) if own else _client(scheduler))
        cluster = Cluster(client, model, config, spread=spread, slide_timeout_s=slide_timeout_s, fixed=own)
        stack.callback(cluster.cancel)
        cluster.check(reference)
        yield cluster


class Cluster:
    """Gives slides to the processes of a Dask cluster and waits for them. `open_cluster` makes one."""

    def __init__(
        self,
        client: Client,
        model: str,
        config: SegmentConfig,
        *,
        spread: Spread,
        slide_timeout_s: float | None,
        fixed: bool,
    ) -> None:
        self._client = client
        self._model = model
        self._config = config
        self._spread = spread
        self._timeout_s = slide_timeout_s
        self._fixed = fixed
        self._topic = f"wsi-segment-{uuid.uuid4()}"
        self._lock = threading.Lock()
        # Of its own: a worker whose mount is stale must not keep slides from being cancelled.
        self._folder_lock = threading.Lock()
        self._slides: dict[str, SlideTasks] = {}
        self._folders: set[Path] = set()
        self._cancelled = False
        self._crew = Crew(client, gpu=config.device != "cpu")

    @property
    def slides_at_once(self) -> int:
        """A slide for each process; where the cluster can grow one more, which makes it."""
        if self._spread == "blocks":
            return SLIDES_IN_BANDS
        return self.processes if self._fixed else self.processes + 1

    @property
    def processes(self) -> int:
        """How many processes can take work, as of a few seconds ago; 1 where none can at the moment."""
        return max(1, len(self._crew.able()))

    def check(self, model: ModelRef) -> None:
        """Wait for a first process, and see that those that are there can do the work. Raises ClusterError."""
        # A task, not a call of all workers: a cluster that has none yet starts one when there is a task.
        probe = self._client.submit(versions, pure=False)
        while not probe.done():
            time.sleep(0.05)
            self._crew.able()
        if probe.status != "finished":
            error = probe.exception() if probe.status == "error" else probe.status
            raise ClusterError(
                f"the cluster cannot run wsi-segment ({type(error).__name__}: {error}); install the same versions "
                f"everywhere"
            )
        self._ask_all(check_worker, versions(), model)

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        config = job_config(job, self._config)
        model = _model_ref(job.model or self._model)
        self._check_folder(output)
        with self._tasks(job.path.name, progress) as tasks:
            context = TaskContext(tasks.id, self._topic, model, config)
            if self._spread == "blocks":
                return _seen_here(self._segment_in_bands(tasks, context, job.path, output), output)
            tasks.submit(segment_slide_there, context, job.path.absolute(), output.absolute())
            try:
                result: SlideResult = tasks.next_ended()
            except SlideNotFoundError as error:
                if not job.path.is_file():
                    raise
                raise ClusterError(
                    f"{job.path.name}: lies here, but a worker does not see it at {job.path.absolute()}; mount the "
                    f"folder there, at the same path"
                ) from error
        self._wait_until_visible(job, output / result.slide)
        return _seen_here(result, output)

    def _segment_in_bands(self, tasks: SlideTasks, context: TaskContext, path: Path, output: Path) -> SlideResult:
        # A process resolves the settings, because this one may have no GPU. The other processes use the same runtime,
        # because blocks must not differ.
        tasks.submit(resolve_there, context)
        settings: ResolvedSettings = tasks.next_ended()
        context = replace(context, config=with_runtime(context.config, settings.runtime))
        runner = _BandRunner(self, tasks, context, load_bundle(context.model.name).card)
        return segment_slide_with(runner, path.absolute(), output.absolute(), settings, tasks.tell)

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            for tasks in self._slides.values():
                tasks.cancel()

    def _ask_all(self, question: Callable[..., str], *arguments: object) -> None:
        able = self._crew.able(now=True)
        answers = self._client.run(answer, question, *arguments, workers=able, on_error="return")
        for address, said in answers.items():
            if isinstance(said, OSError):
                continue  # it has gone since
            if isinstance(said, Exception):
                said = f"cannot run wsi-segment ({type(said).__name__}: {said}); install the same versions everywhere"
            if said:
                raise ClusterError(f"worker {address} {said}")

    def _check_folder(self, output: Path) -> None:
        """See, once, that all processes write where we do."""
        with self._folder_lock:
            if output in self._folders:
                return
            try:
                output.mkdir(parents=True, exist_ok=True)
                probe, content = output.absolute() / f".{uuid.uuid4()}.probe", str(uuid.uuid4())
                probe.write_text(content, encoding="utf-8")
            except OSError:
                return  # the slides' own error says it better
            try:
                self._ask_all(check_folder, probe, content)
            except ClusterError as error:
                raise ClusterError(f"{output}: {error}; mount it there, at the same path") from None
            finally:
                probe.unlink(missing_ok=True)
            self._folders.add(output)

    def _wait_until_visible(self, job: SlideJob, folder: Path) -> None:
        end = time.monotonic() + VISIBLE_S
        while read_header(folder) is None:
            if time.monotonic() > end:
                raise ClusterError(
                    f"{job.path.name}: a worker has finished it, but {folder} does not appear here; is it the same "
                    f"folder there?"
                )
            time.sleep(0.5)

    @contextmanager
    def _tasks(self, name: str, progress: Progress) -> Iterator[SlideTasks]:
        watch = self._crew.able
        tasks = SlideTasks(name, self._client, self._crew.resources, self._timeout_s, progress, watch)
        with suppress(ClosedClientError):  # its first task says so
            # Each time anew: a scheduler that was lost and found does not know of it.
            self._client.subscribe_topic(self._topic, self._deliver)
        with self._lock:
            if self._cancelled:
                tasks.cancel()
            self._slides[tasks.id] = tasks
        try:
            yield tasks
        finally:
            with self._lock:
                del self._slides[tasks.id]
            tasks.release()

    def _deliver(self, event: tuple[float, Mapping[str, Any]]) -> None:
        """Called on the client's own thread: it must not wait."""
        _, facts = event
        tasks = self._slides.get(facts["id"])
        if tasks is not None:
            tasks.receive(Message(facts["kind"], facts))


class _BandRunner:
    """Runs the blocks of a slide in bands, each in one of the cluster's processes."""

    def __init__(self, cluster: Cluster, tasks: SlideTasks, context: TaskContext, card: ModelCard) -> None:
        self.card = card
        self.digest = context.model.digest
        self._cluster = cluster
        self._tasks = tasks
        self._context = context
        self._devices: set[str] = set()

    @property
    def device(self) -> str:
        """Those of the processes that had blocks to run."""
        return ", ".join(sorted(self._devices)) or "none"

    def run(self, work: BlockWork, slide: Slide, blocks: Sequence[Block], finished: Finished) -> None:  # noqa: ARG002
        left = deque(bands(blocks, self._cluster.processes, work.settings.in_flight))
        while left or self._tasks.running:
            while left and self._tasks.running < BANDS_PER_WORKER * self._cluster.processes:
                self._tasks.submit(segment_band_there, self._context, make_band(work, left.popleft()))
            records, device = self._tasks.next_ended()
            self._devices.add(device)
            for record in records:
                finished(record)


def bands(blocks: Sequence[Block], processes: int, in_flight: int) -> list[Sequence[Block]]:
    """Cut blocks into runs of consecutive ones: long enough to read ahead in, short enough that no process is left
    with much more than the others.
    """
    length = min(4 * in_flight, max(1, -(-len(blocks) // (SHARES_PER_WORKER * processes))))
    return [blocks[start : start + length] for start in range(0, len(blocks), length)]


def _seen_here(result: SlideResult, output: Path) -> SlideResult:
    """A result with its folder named as the caller named the output."""
    return replace(result, folder=output / result.slide)


def _model_ref(model: str) -> ModelRef:
    bundle = load_bundle(model)
    return ModelRef(model if model in shipped_bundles() else str(bundle.path.absolute()), bundle.digest)


@contextmanager
def _client(scheduler: str) -> Iterator[Client]:
    if "://" in scheduler:
        where = {"address": scheduler}
    elif Path(scheduler).is_file():
        where = {"scheduler_file": scheduler}
    else:
        raise ConfigError(
            f"--scheduler is {scheduler!r}; it must be local, local:N, the address of a dask.distributed cluster "
            f"(tcp://…, tls://…), or its scheduler file"
        )
    try:
        client = Client(**where, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(
            f"{scheduler}: no Dask scheduler answers there ({error}); check the address, and that it runs"
        ) from error
    with closing(client):
        yield client


@contextmanager
def _own_client(scheduler: str, config: SegmentConfig) -> Iterator[Client]:
    gpus = visible_gpus(config.device)
    try:
        count = process_count(scheduler, gpus)
    except ValueError:
        raise ConfigError(f"--scheduler is {scheduler!r}; N of local:N must be 1 or more") from None
    with own_processes(count, gpus) as cluster, closing(Client(cluster, set_as_default=False)) as client:
        yield client


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep what Dask logs of lost connections and ended processes to itself: our own errors and warnings say it."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in ("distributed", "tornado")]
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        if logging.root.level > logging.DEBUG:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
