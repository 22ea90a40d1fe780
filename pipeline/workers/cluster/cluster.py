"""Slides segmented by the processes of a dask.distributed cluster: whole slides, or bands of a slide's blocks."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client
from distributed.client import ClosedClientError

from models.bundle import load_bundle, shipped_bundles
from models.card import ModelCard
from pipeline.config import ResolvedSettings, SegmentConfig
from pipeline.errors import ClusterError
from pipeline.progress import Progress
from pipeline.results.record import installed_versions, read_header, versions
from pipeline.results.slide_result import SlideResult
from pipeline.slide.blocks import BlockWork
from pipeline.slide.engine import Finished
from pipeline.slide.recipe import segment_slide_with
from pipeline.workers.base import SlideJob, Spread, job_config
from pipeline.workers.cluster.available import AvailableProcesses
from pipeline.workers.cluster.checks import WorkerChecks
from pipeline.workers.cluster.local_processes import local_processes, process_count, visible_gpus
from pipeline.workers.cluster.slide_tasks import Message, SlideTasks, Usable
from pipeline.workers.cluster.tasks import (
    ModelRef,
    TaskContext,
    make_band,
    resolve_task,
    segment_band_task,
    segment_slide_task,
    with_runtime,
)
from wsi.errors import SlideNotFoundError
from wsi.grid import Block
from wsi.slide import Slide

log = logging.getLogger(__name__)

CONNECT_S = 20.0
"""Timeout of the connection to a scheduler, in seconds."""

BANDS_PER_WORKER = 2
"""Bands of a slide that are assigned to a process: the running one and the next one."""

SHARES_PER_WORKER = 4
"""Minimum number of bands per process, so that the processes finish a slide at about the same time."""

VISIBLE_S = 60.0
"""Seconds until the files of another machine must be visible here. Network mounts cache missing files."""

SLIDES_IN_BANDS = 2
"""Slides at once with spread "blocks": the processes are busy while the polygons of a slide are joined here."""


@contextmanager
def open_cluster(
    scheduler: str, model: str, config: SegmentConfig, *, spread: Spread, slide_timeout_s: float | None
) -> Iterator[Cluster]:
    """Connect to a cluster or start local processes, and check that they can run tasks. See `open_workers`.

    `scheduler` has passed `check_workers`.
    """
    reference = _model_ref(model)
    with ExitStack() as stack:
        stack.enter_context(_quiet_library())
        local = scheduler.partition(":")[0] == "local"
        client = stack.enter_context(_local_client(scheduler, config) if local else _client(scheduler))
        cluster = Cluster(client, model, config, spread=spread, slide_timeout_s=slide_timeout_s, fixed=local)
        stack.callback(cluster.cancel)
        cluster.check(reference)
        yield cluster


class Cluster:
    """Segments slides in the processes of a Dask cluster. Use `open_cluster`."""

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
        self._slides: dict[str, SlideTasks] = {}
        self._cancelled = False
        self._available = AvailableProcesses(client, gpu=config.device != "cpu")
        self._checks = WorkerChecks(client, self._available, config)

    @property
    def slides_at_once(self) -> int:
        """Return one slide per process, and one more if the cluster can grow: a waiting task makes it grow."""
        if self._spread == "blocks":
            return SLIDES_IN_BANDS
        return self.processes if self._fixed else self.processes + 1

    @property
    def processes(self) -> int:
        """Return the number of available processes, as of a few seconds ago, but at least 1."""
        return max(1, len(self._available.addresses()))

    def check(self, model: ModelRef) -> None:
        """Wait for a first process, and check that all present processes can run tasks. Raises ClusterError."""
        # A task starts the first process of a cluster that has none; a call of all workers does not.
        probe = self._client.submit(versions, pure=False)
        while not probe.done():
            time.sleep(0.05)
            self._available.addresses()
        if probe.status != "finished":
            error = probe.exception() if probe.status == "error" else probe.status
            raise ClusterError(
                f"the cluster cannot run wsi-segment ({type(error).__name__}: {error}); install the same versions "
                f"everywhere"
            )
        self._checks.check_model(model)

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        """See `Workers.segment`."""
        config = job_config(job, self._config)
        model = _model_ref(job.model or self._model)
        self._checks.check_folder(output)
        self._checks.check_slide(job.path)

        def usable(address: str, error: Exception | None) -> bool:
            # All local processes share this machine.
            return self._fixed or self._checks.is_usable(address, job, output, model, error)

        with self._tasks(job.path.name, progress, usable) as tasks:
            context = TaskContext(tasks.id, self._topic, model, config)
            if self._spread == "blocks":
                return _seen_here(self._segment_in_bands(tasks, context, job, output), output)
            tasks.submit(segment_slide_task, context, job.path.absolute(), output.absolute(), job.result_name)
            try:
                result: SlideResult = tasks.next_ended()
            except SlideNotFoundError as error:
                if not job.path.is_file():
                    raise
                raise ClusterError(
                    f"{job.path.name}: the slide is visible here, but a worker does not see it at "
                    f"{job.path.absolute()}; mount the folder there, at the same path"
                ) from error
        self._wait_until_visible(job, output / result.slide)
        return _seen_here(result, output)

    def _segment_in_bands(self, tasks: SlideTasks, context: TaskContext, job: SlideJob, output: Path) -> SlideResult:
        # A process resolves the settings, because this one may have no GPU. The other processes use the same runtime,
        # because blocks must not differ.
        tasks.submit(resolve_task, context)
        settings: ResolvedSettings = tasks.next_ended()
        if settings.runtime not in installed_versions():  # the result could not state its version
            raise ClusterError(
                f"{job.path.name}: the workers compute with {settings.runtime}, which is not installed here; install "
                f"the same versions everywhere, or pass --runtime torch"
            )
        context = replace(context, config=with_runtime(context.config, settings.runtime))
        runner = _BandRunner(self, tasks, context, load_bundle(context.model.name).card)
        return segment_slide_with(
            runner, job.path.absolute(), output.absolute(), settings, tasks.report, name=job.result_name
        )

    def cancel(self) -> None:
        """See `Workers.cancel`."""
        with self._lock:
            self._cancelled = True
            for tasks in self._slides.values():
                tasks.cancel()

    def _wait_until_visible(self, job: SlideJob, folder: Path) -> None:
        end = time.monotonic() + VISIBLE_S
        while read_header(folder) is None:
            if time.monotonic() > end:
                raise ClusterError(
                    f"{job.path.name}: a worker has finished it, but {folder} is not visible here; mount the same "
                    f"folder at this path"
                )
            time.sleep(0.5)

    @contextmanager
    def _tasks(self, name: str, progress: Progress, usable: Usable) -> Iterator[SlideTasks]:
        tasks = SlideTasks(name, self._client, self._available, self._timeout_s, progress, usable)
        with suppress(ClosedClientError):  # the first task raises the error
            # For every slide, because a restarted scheduler has lost the subscription.
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
        """Pass on a message. The client calls this on its own thread, so it must not block."""
        _, facts = event
        tasks = self._slides.get(facts["id"])
        if tasks is not None:
            tasks.receive(Message(facts["kind"], facts))


class _BandRunner:
    """Runs the blocks of a slide in bands. Each band runs in one process of the cluster."""

    def __init__(self, cluster: Cluster, tasks: SlideTasks, context: TaskContext, card: ModelCard) -> None:
        self.card = card
        self.digest = context.model.digest
        self._cluster = cluster
        self._tasks = tasks
        self._context = context
        self._devices: set[str] = set()

    @property
    def device(self) -> str:
        """Return the devices of the processes that ran blocks."""
        return ", ".join(sorted(self._devices)) or "none"

    def run(self, work: BlockWork, slide: Slide, blocks: Sequence[Block], finished: Finished) -> None:  # noqa: ARG002
        shared = make_band(work, ())
        left = deque(bands(blocks, self._cluster.processes, work.settings.in_flight))
        while left or self._tasks.running:
            while left and self._tasks.running < BANDS_PER_WORKER * self._cluster.processes:
                self._tasks.submit(segment_band_task, self._context, replace(shared, blocks=tuple(left.popleft())))
            records, device = self._tasks.next_ended()
            self._devices.add(device)
            for record in records:
                finished(record)


def bands(blocks: Sequence[Block], processes: int, in_flight: int) -> list[Sequence[Block]]:
    """Cut blocks into bands of consecutive blocks.

    A band is long enough to read ahead, and short enough that no process has much more work left than the others.
    """
    length = min(4 * in_flight, max(1, -(-len(blocks) // (SHARES_PER_WORKER * processes))))
    return [blocks[start : start + length] for start in range(0, len(blocks), length)]


def _seen_here(result: SlideResult, output: Path) -> SlideResult:
    """Return the result with its folder as a path below the caller's output."""
    return replace(result, folder=output / result.slide)


def _model_ref(model: str) -> ModelRef:
    bundle = load_bundle(model)
    return ModelRef(model if model in shipped_bundles() else str(bundle.path.absolute()), bundle.digest)


@contextmanager
def _client(scheduler: str) -> Iterator[Client]:
    where = {"address" if "://" in scheduler else "scheduler_file": scheduler}
    try:
        client = Client(**where, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(
            f"{scheduler}: the Dask scheduler does not answer ({error}); check the address, and that the scheduler runs"
        ) from error
    with closing(client):
        yield client


@contextmanager
def _local_client(scheduler: str, config: SegmentConfig) -> Iterator[Client]:
    gpus = visible_gpus(config.device)
    with (
        local_processes(process_count(scheduler, gpus), gpus) as cluster,
        closing(Client(cluster, set_as_default=False)) as client,
    ):
        yield client


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Silence Dask's log of lost connections and dead processes. Our own errors and warnings report them."""
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
