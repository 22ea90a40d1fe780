"""What the record of a run states about the slide, its blocks and its areas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from models.card import ModelCard
from pipeline.formats.familiarity import CELL_OUT, FamiliarityMap
from pipeline.formats.ome_zarr import MapSpec
from pipeline.results.record import Familiarity, LeftOutArea, SlideFacts, TileCounts
from pipeline.slide.blocks import BlockRecord, BlockWork
from pipeline.slide.familiarity import join_values
from pipeline.slide.plan import Plan
from wsi.box import Box
from wsi.slide import SlideInfo
from wsi.tissue import Tissue


def status_of(tissue: Tissue, plan: Plan) -> Literal["done", "no tissue", "unrecognized"]:
    """Return the status of a slide whose planned blocks are finished."""
    if plan.blocks:
        return "done"
    return "unrecognized" if tissue.has_unrecognized_structure else "no tissue"


def slide_facts(info: SlideInfo, stamp: str) -> SlideFacts:
    """Return what the record states about the slide's file. Its other properties hold names, dates and barcodes."""
    return SlideFacts(
        name=info.path.name,
        path=info.path.absolute(),
        size=info.size_l0,
        mpp=info.mpp,
        mpp_source=info.mpp_source,
        vendor=info.vendor,
        backend=info.backend,
        bounds=info.bounds_l0,
        qupath_offset=(info.bounds_l0.x, info.bounds_l0.y),
        stamp=stamp,
    )


def left_out_areas(tissue: Tissue) -> tuple[LeftOutArea, ...]:
    """Return the area and the pieces of each kind that is not plain tissue."""
    return tuple(
        LeftOutArea(name=kind.title, area_mm2=extent.area_um2 / 1e6, pieces=extent.pieces)
        for kind, extent in tissue.left_out.items()
    )


def tissue_mm2(records: Sequence[BlockRecord], spec: MapSpec) -> float:
    """Return the area of the tissue."""
    return sum(r.tissue_area_px for r in records) * spec.mpp_out**2 / 1e6


def label_areas_mm2(records: Sequence[BlockRecord], spec: MapSpec) -> dict[str, float]:
    """Return the area of each class, counted in pixels of the label image."""
    counts = np.sum([r.class_px for r in records] or [[0] * (len(spec.classes) + 1)], axis=0)
    return {one.name: float(n) * spec.mpp_out**2 / 1e6 for one, n in zip(spec.classes, counts[1:], strict=True)}


def tile_counts(records: Sequence[BlockRecord]) -> TileCounts:
    """Return the tiles of all blocks."""
    return TileCounts(
        run=sum(r.tiles for r in records),
        segmented=sum(r.segmented for r in records),
        without_class=sum(r.unclassified for r in records),
        unreadable=sum(len(r.bad_tiles_l0) for r in records),
    )


def bad_tiles_l0(records: Sequence[BlockRecord], info: SlideInfo) -> tuple[Box, ...]:
    """Return the tiles with unreadable parts, measured from the corner of the bounds, as polygons and maps are."""
    x, y = info.bounds_l0.x, info.bounds_l0.y
    return tuple(sorted({Box(*box).shift(-x, -y) for record in records for box in record.bad_tiles_l0}))


def stage_seconds(records: Sequence[BlockRecord]) -> dict[str, float]:
    """Return the time per stage, summed over the blocks. Stages of different blocks overlap."""
    stages = {stage for r in records for stage in r.seconds}
    return {f"blocks: {stage}": sum(r.seconds.get(stage, 0.0) for r in records) for stage in sorted(stages)}


def warnings_of(work: BlockWork, model_mpp: float, records: Sequence[BlockRecord], polygons: int) -> tuple[str, ...]:
    """Return the warnings about the slide, its tissue, its pixel size, unreadable tiles and missing polygons."""
    warnings = (*work.info.warnings, *work.tissue.warnings)
    if work.grid.lv_per_m < 1:
        warnings += (f"the slide is coarser than the model's {model_mpp:g} µm/px; the pixels were enlarged",)
    if bad := sum(len(r.bad_tiles_l0) for r in records):
        tiles = sum(r.tiles for r in records)
        warnings += (f"{bad} of {tiles} tiles could not be read; their missing parts count as glass",)
    if records and not polygons:
        largest = f"{work.settings.min_area_um2:g} µm² (--min-area)"
        warnings += (f"the tissue has no polygons: its regions have no class, or are smaller than {largest}",)
    return warnings


def familiarity_map_of(
    card: ModelCard, work: BlockWork, plan: Plan, records: Sequence[BlockRecord]
) -> FamiliarityMap | None:
    """Return the familiarity of the slide's tissue, or None if the model has no statistics or the slide no tissue."""
    if card.familiarity is None or not plan.blocks:
        return None
    tissue_px, unfamiliar_px = sum(r.tissue_px for r in records), sum(r.unfamiliar_px for r in records)
    return join_values(work.folder, plan.grid, plan.blocks, tissue_px, unfamiliar_px)


def familiarity_of(card: ModelCard, familiarity_map: FamiliarityMap | None, plan: Plan) -> Familiarity | None:
    """Return what the record states about the familiarity, or None without a map of it."""
    if card.familiarity is None or familiarity_map is None:
        return None
    return Familiarity(
        unfamiliar_share=familiarity_map.share,
        share_limit=card.familiarity.share_limit,
        l0_per_px=plan.grid.l0_per_out * CELL_OUT,
    )


def unfamiliar_warning(card: ModelCard, familiarity: Familiarity | None) -> str:
    """Return the warning of a slide that does not look like the training data, or an empty text."""
    if familiarity is None or not familiarity.is_unfamiliar:
        return ""
    scope = f" ({card.scope})" if card.scope else ""
    return (
        f"{familiarity.unfamiliar_share:.0%} of the tissue of this slide does not look like the model's training "
        f"data{scope}".replace("%", " %", 1)
    )
