"""What runs inside the processes of a cluster: a slide, a band of a slide's blocks, and the check before both.

Tasks are small, pixels never travel: a task names files, and what it makes is on the shared disk when it returns.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from distributed import Worker, get_worker
from distributed.utils import sync

from models.bundle import load_bundle
from models.predictor import Predictor
from models.runtimes import Runtime
from pipeline.config import SegmentConfig, resolve
from pipeline.errors import Cancelled, ClusterError
from pipeline.results.record import versions
from pipeline.results.slide_result import SlideResult
from pipeline.slide.blocks import BlockRecord, BlockWork
from pipeline.slide.engine import run_blocks
from pipeline.slide.recipe import segment_slide
from pipeline.workers.in_process import load_predictor, predictor_settings
from pipeline.workers.malloc import keep_freed_memory
from pipeline.workers.outcome import Outcome
from wsi.errors import WsiSegmentError
from wsi.grid import Block
from wsi.slide import Slide

log = logging.getLogger(__name__)


PROGRESS_S = 0.5
"""Least time between two messages about the progress of one stage."""

ANSWER_S = 30.0
"""How long a process may take to answer a question: it hangs where it reads from a mount that is stale."""


@dataclass(frozen=True)
class ModelRef:
    """A model as another process finds it."""

    name: str
    """Of a shipped bundle, or the absolute path of one."""
    digest: str


@dataclass(frozen=True)
class TaskContext:
    """What all tasks of one slide have in common."""

    id: str
    topic: str
    """Where messages go: {"id": …, "key": …, "worker": …, "kind": "started"}; "progress" has the callback's values,
    "ended" an `Outcome`, pickled.
    """
    model: ModelRef
    config: SegmentConfig


@dataclass(frozen=True)
class Band:
    """Some blocks of one slide, and what they have in common."""

    work: BlockWork
    """Without the tissue's mask."""
    mask: bytes
    """Of the tissue: bits, row by row, compressed."""
    shape_HW: tuple[int, int]
    """Of the mask."""
    identity: bytes
    """The working folder's identity.json: as long as it is that, the folder is this run's."""
    blocks: tuple[Block, ...]


def make_band(work: BlockWork, blocks: Sequence[Block]) -> Band:
    """Pack blocks for another process."""
    bare = replace(work.tissue, mask_HW=np.zeros((0, 0), bool))
    return Band(
        work=replace(work, tissue=bare),
        mask=zlib.compress(np.packbits(work.tissue.mask_HW, axis=1).tobytes(), 1),
        shape_HW=(work.tissue.mask_HW.shape[0], work.tissue.mask_HW.shape[1]),
        identity=(work.folder / "identity.json").read_bytes(),
        blocks=tuple(blocks),
    )


def check_worker(needs: dict[str, str], model: ModelRef) -> str:
    """What keeps this process from doing the work, or nothing: other versions, or another model under the name."""
    have = versions()
    # A CUDA build and a CPU build of one version do the same.
    other = [
        f"{name} {have[name]} instead of {need}" for name, need in needs.items() if _plain(have[name]) != _plain(need)
    ]
    if other:
        return f"has {', '.join(other)}; install the same versions everywhere"
    try:
        _check_digest(model)
    except WsiSegmentError as error:
        return f"cannot use the model: {error}"
    return ""


def check_folder(probe: Path, content: str) -> str:
    """What keeps this process from writing where the client wrote `probe`, or nothing."""
    try:
        return "" if probe.read_text(encoding="utf-8") == content else "sees another folder there"
    except OSError as error:
        return f"does not see the folder ({error.strerror or error})"


async def answer(question: Callable[..., str], *arguments: object) -> str:
    """What a process answers to one of the questions above, or that it did not in time."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(question, *arguments), ANSWER_S)
    except TimeoutError:
        return f"has not answered within {ANSWER_S:g} s, as where a mount is stale"


def segment_slide_there(context: TaskContext, path: Path, output: Path) -> None:
    """`segment_slide` in a process of a cluster; a SlideResult goes to the topic."""
    _run(context, lambda turn: _segment_slide(context, path, output, turn))


def segment_band_there(context: TaskContext, band: Band) -> None:
    """Segment a band; the records of blocks whose files are on the disk, and the device, go to the topic."""
    _run(context, lambda turn: _segment_band(context, band, turn))


def resolve_there(context: TaskContext) -> None:
    """Resolve the settings in a process that has the device; the ResolvedSettings go to the topic."""
    _run(context, lambda _: resolve(context.config, _predictor(context).compute))


def _segment_slide(context: TaskContext, path: Path, output: Path, turn: _Turn) -> SlideResult:
    if not output.is_dir():
        raise ClusterError(
            f"{path.name}: worker {get_worker().address} does not see the folder {output}; mount it there, at the same "
            f"path"
        )
    return segment_slide(path, output, _predictor(context), context.config, _teller(turn))


def _segment_band(context: TaskContext, band: Band, turn: _Turn) -> tuple[list[BlockRecord], str]:
    predictor, work = _predictor(context), _unpack(band)
    records: list[BlockRecord] = []
    stop = threading.Event()

    def stopped() -> bool:
        return stop.is_set() or turn.given_up() or not _is_ours(band)

    if not _is_ours(band):
        raise ClusterError(
            f"{work.info.path.name}: worker {get_worker().address} does not see the folder {work.folder}, or another "
            f"run has taken it over; mount it there, at the same path"
        )
    with Slide(work.info) as slide:
        run_blocks(work, slide, predictor, band.blocks, records.append, stop, stopped)
    return records, str(predictor.device)


def _is_ours(band: Band) -> bool:
    """Whether the working folder still is that of the run that sent the band: its client may be long gone."""
    try:
        return (band.work.folder / "identity.json").read_bytes() == band.identity
    except OSError:
        return False


def _unpack(band: Band) -> BlockWork:
    mask = np.frombuffer(zlib.decompress(band.mask), np.uint8)
    height, width = band.shape_HW
    mask_HW = np.unpackbits(mask.reshape(height, -1), axis=1, count=width).astype(bool)
    return replace(band.work, tissue=replace(band.work.tissue, mask_HW=mask_HW))


class _Turn:
    """A task that runs, as the work within it sees it."""

    def __init__(self, context: TaskContext) -> None:
        self._context = context
        self._worker: Worker = get_worker()
        self._key = self._worker.get_current_task()

    def given_up(self) -> bool:
        """Whether nobody waits for the task any more."""
        task = self._worker.state.tasks.get(self._key)
        return task is None or task.state in ("cancelled", "released", "forgotten")

    def tell(self, kind: str, **facts: object) -> None:
        """Send a message; returns when the scheduler has it, so that messages arrive in order, and before all that
        Dask says of the task. Raises Cancelled where there is no scheduler any more.
        """
        message = {"id": self._context.id, "key": self._key, "kind": kind, "worker": self._worker.address} | facts
        try:
            sync(self._worker.loop, self._worker.scheduler.log_event, topic=self._context.topic, msg=message)
        except (OSError, RuntimeError) as error:  # the latter of a worker that is closing
            raise Cancelled("the scheduler has gone, and with it who waits for the task") from error


_at_work = threading.Lock()


def _run(context: TaskContext, work: Callable[[_Turn], object]) -> None:
    """Do what a task asks for, once this process, which may have several threads for tasks, does nothing else.

    Its begin and its end are told as they happen: what Dask keeps of a task is lost with the process, and Dask cannot
    tell whom a process was ended by.
    """
    turn = _Turn(context)
    while not _at_work.acquire(timeout=1.0):
        if turn.given_up():
            return
    try:
        keep_freed_memory()
        turn.tell("started")
        turn.tell("ended", ended=pickle.dumps(_ended(work, turn)))
    finally:
        _at_work.release()


def _ended(work: Callable[[_Turn], object], turn: _Turn) -> Outcome[object]:
    try:
        return Outcome(work(turn))
    except Exception as error:
        # Where nobody waits the client may have cleared the working folder away.
        if not isinstance(error, WsiSegmentError) and not turn.given_up():
            log.exception("a task failed")
            error.add_note("".join(traceback.format_exception(error)))
        return Outcome.by(error)


def _teller(turn: _Turn) -> Callable[[str, int, int], None]:
    """A progress callback that sends messages, not too many, and ends a slide that nobody waits for."""
    last_stage, last_time = "", 0.0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_time
        if turn.given_up():
            raise Cancelled("nobody waits for it any more")
        now = time.monotonic()
        if stage != last_stage or done == total or now - last_time >= PROGRESS_S:
            last_stage, last_time = stage, now
            turn.tell("progress", stage=stage, done=done, total=total)

    return tell


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
            f"model {model.name}: is another one here (digest {digest[:12]} instead of {model.digest[:12]}); install "
            f"the same one everywhere"
        )


def _plain(version: str) -> str:
    return version.partition("+")[0]
