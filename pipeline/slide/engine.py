"""Runs the blocks of one slide on Dask's threads, a bounded number at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import dask
import dask.threaded

from models.bundle import ModelCard
from models.predictor import Predictor
from pipeline.slide.blocks import BlockRecord, BlockWork, segment_block
from pipeline.slide.journal import make_durable
from wsi.grid import Block
from wsi.slide import Slide

Item = TypeVar("Item")

Finished = Callable[[BlockRecord], None]
"""Called with a block's record, from any thread, once its files are on the disk."""


class BlockRunner(Protocol):
    """Something that runs the blocks of a slide with a model."""

    @property
    def card(self) -> ModelCard:
        """Of the model."""
        ...

    @property
    def digest(self) -> str:
        """Of the model."""
        ...

    @property
    def device(self) -> str:
        """What the networks ran on."""
        ...

    def run(self, work: BlockWork, slide: Slide, blocks: Sequence[Block], finished: Finished) -> None:
        """Segment the blocks, in any order; `slide` is theirs, open in this process.

        The first error ends the run, one of `finished` too: no new block is begun and it is raised once the running
        ones have ended.
        """
        ...


class ThreadRunner:
    """Runs blocks on threads of this process."""

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
    """Segment blocks on threads and make their files durable; `stopped` is asked now and then, and after an error it
    has to be True once `stop` is set.
    """

    def run(block: Block) -> None:
        record, files = segment_block(work, slide, predictor, block, stopped)
        finished(make_durable(work.folder, record, files))

    run_all(run, blocks, work.settings.in_flight, stop)


def run_all(function: Callable[[Item], None], items: Iterable[Item], in_flight: int, stop: threading.Event) -> None:
    """Call `function` on every item, at most `in_flight` at a time; the items are all that the graph holds.

    The first error ends the run: `stop` is set, which the function should look at now and then, no new item is begun,
    and the error is raised once the running ones have ended. The same holds for KeyboardInterrupt.
    """
    with ThreadPoolExecutor(in_flight, thread_name_prefix="block") as pool:
        tasks = [dask.delayed(function, pure=False)(item) for item in items]
        try:
            # Dask's threaded scheduler keeps as many tasks running as the pool has threads. Not by its name: looking
            # that up imports dask.distributed, which takes a second.
            dask.compute(*tasks, scheduler=dask.threaded.get, pool=pool)
        except BaseException:
            stop.set()
            raise
