"""Run the blocks of one slide on Dask's threads, a bounded number at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import dask
import dask.threaded

from models.card import ModelCard
from models.predictor import Predictor
from pipeline.slide.blocks import BlockRecord, BlockWork, segment_block
from pipeline.slide.journal import make_durable
from wsi.grid import Block
from wsi.slide import Slide

Item = TypeVar("Item")

Finished = Callable[[BlockRecord], None]
"""Called with a block's record, from any thread, after the block's files are on disk."""


class BlockRunner(Protocol):
    """An executor that segments the blocks of a slide with one model."""

    @property
    def card(self) -> ModelCard:
        """Return the card of the model."""
        ...

    @property
    def digest(self) -> str:
        """Return the digest of the model."""
        ...

    @property
    def device(self) -> str:
        """Return the name of the device that runs the networks."""
        ...

    def run(self, work: BlockWork, slide: Slide, blocks: Sequence[Block], finished: Finished) -> None:
        """Segment the blocks in any order. `slide` is the open slide that they belong to.

        The first error ends the run, also an error of `finished`: no new block starts, and the error is raised when the
        running blocks have ended.
        """
        ...


class ThreadRunner:
    """Run blocks on threads of this process."""

    def __init__(self, predictor: Predictor) -> None:
        self.card = predictor.card
        self.digest = predictor.digest
        self.device = str(predictor.device)
        self._predictor = predictor

    def run(self, work: BlockWork, slide: Slide, blocks: Sequence[Block], finished: Finished) -> None:
        stop = threading.Event()
        run_blocks(work, slide, self._predictor, blocks, finished, stop, stop.is_set)


def run_blocks(
    work: BlockWork,
    slide: Slide,
    predictor: Predictor,
    blocks: Sequence[Block],
    finished: Finished,
    stop: threading.Event,
    stopped: Callable[[], bool],
) -> None:
    """Segment blocks on threads and make their files durable.

    `stopped` is called from time to time and ends the run if it returns True. It must return True once `stop` is set,
    which an error does.
    """

    def run(block: Block) -> None:
        record, files = segment_block(work, slide, predictor, block, stopped)
        finished(make_durable(work.folder, record, files))

    run_all(run, blocks, work.settings.in_flight, stop)


def run_all(function: Callable[[Item], None], items: Iterable[Item], in_flight: int, stop: threading.Event) -> None:
    """Call `function` on every item, at most `in_flight` at a time. The graph contains only the items.

    The first error ends the run: `stop` is set, no new item starts, and the error is raised when the running calls have
    ended. KeyboardInterrupt does the same. The function should check `stop` from time to time.
    """
    with ThreadPoolExecutor(in_flight, thread_name_prefix="block") as pool:
        tasks = [dask.delayed(function, pure=False)(item) for item in items]
        try:
            # Dask's threaded scheduler runs as many tasks as the pool has threads. It is passed as a function, because
            # looking up its name imports dask.distributed, which takes a second.
            dask.compute(*tasks, scheduler=dask.threaded.get, pool=pool)
        except BaseException:
            stop.set()
            raise
