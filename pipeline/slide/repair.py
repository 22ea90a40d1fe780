"""Repair a damaged result: take its intact blocks over as finished blocks of a new run.

A block of a published result is intact if its line in `blocks.jsonl` and all its chunks are. The polygons of such a
block are traced again from its labels, and its part of the familiarity is cut from the picture. The new run computes
all other blocks, and all files that are made of blocks.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.familiarity import CELL_OUT, read_familiarity
from pipeline.results.folder import ResultFolder
from pipeline.results.names import BLOCKS, FAMILIARITY
from pipeline.results.record import read_header
from pipeline.slide.blocks import BlockRecord, BlockWork, chunks_of, save_block_regions
from pipeline.slide.familiarity import save_values, values_file
from pipeline.slide.journal import Journal, has_digest, make_durable, read_records
from wsi.box import Box
from wsi.grid import Block

log = logging.getLogger(__name__)


def take_over_blocks(folder: ResultFolder, work: BlockWork, blocks: Sequence[Block], journal: Journal) -> None:
    """Copy the intact blocks of a damaged result into the working folder and append their lines to the journal.

    Blocks that the journal has already are left alone. Nothing is copied if the result was computed in another way,
    such as on another processor.
    """
    header = read_header(folder.target)
    computed_with = header.blocks_computed_with if header else None
    if computed_with != folder.work_identity["computed_with"]:
        log.warning("%s: was computed with %s; computing all blocks again", folder.target, computed_with)
        return
    done = journal.finished()
    identity = {key: value for key, value in folder.work_identity.items() if key != "computed_with"}
    identity |= {"tissue": work.tissue.digest}
    published = {record.index: record for record in read_records(folder.target / BLOCKS, identity)}
    if not published:
        log.warning(
            "%s: its blocks are of an earlier version or other tissue; computing all of them again", folder.target
        )
    familiarity_hw = read_familiarity(folder.target / FAMILIARITY)
    for block in blocks:
        if block.index in published and block.index not in done:
            store = folder.target / work.store.path.name
            _take_over(store, familiarity_hw, work, block, published[block.index], journal)


def _take_over(
    store: Path,
    familiarity_hw: NDArray[np.uint8] | None,
    work: BlockWork,
    block: Block,
    record: BlockRecord,
    journal: Journal,
) -> None:
    chunks = chunks_of(work, record)
    if not all(has_digest(store / chunk, digest) for chunk, digest in chunks.items()):
        return
    work.store.sweep_block(block.box_out, chunks)
    for chunk in chunks:
        (work.store.path / chunk).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(store / chunk, work.store.path / chunk)
    regions = save_block_regions(work, block, _labels(work, block.box_out))
    values = values_file(work.folder, block)
    save_values(values, _values(familiarity_hw, block.box_out.reduce(CELL_OUT)))
    copied = make_durable(work.folder, record, [regions, values, *(work.store.path / chunk for chunk in chunks)])
    if copied == record:
        journal.append(record)
    else:
        log.info("block %d: the files made of its result differ from those of the run; computing it again", block.index)


def _labels(work: BlockWork, box_out: Box) -> NDArray[np.uint8]:
    """Return the stored labels of a block, with 0 outside the stored map."""
    labels_HW = np.zeros((box_out.height, box_out.width), np.uint8)
    inside = box_out.intersect(Box(0, 0, *work.store.spec.padded_size_out))
    stored_HW = work.store.labels[inside.y : inside.bottom, inside.x : inside.right]
    labels_HW[: inside.height, : inside.width] = np.asarray(stored_HW)
    return labels_HW


def _values(familiarity_hw: NDArray[np.uint8] | None, box: Box) -> NDArray[np.uint8]:
    """Return the values of a block's cells, with 0 outside the picture."""
    values_hw = np.zeros((box.height, box.width), np.uint8)
    if familiarity_hw is not None:
        part_hw = familiarity_hw[box.slices(Box(0, 0, 0, 0))]
        values_hw[: part_hw.shape[0], : part_hw.shape[1]] = part_hw
    return values_hw
