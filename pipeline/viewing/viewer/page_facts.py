"""The facts about a result that the page fetches first."""

from __future__ import annotations

from models.tissue_class import Color
from pipeline.formats.familiarity import UNFAMILIAR
from pipeline.viewing.viewer import map_tiles
from pipeline.viewing.viewer.open_results import OpenResult
from pipeline.viewing.viewer.outlines import TOLERANCES_L0
from wsi.left_out import LeftOut


def page_facts(opened: OpenResult) -> dict[str, object]:
    """Return the facts that the page shows. Lengths without a unit are in level-0 pixels."""
    result, tiles, map_ = opened.result, opened.slide_tiles, opened.map_tiles
    width_out, height_out = map_.size_out
    return {
        "name": result.name,
        "mpp": result.run.slide.mpp,
        "width": tiles.size_l0[0],
        "height": tiles.size_l0[1],
        "slide": {"tile": tiles.tile, "levels": tiles.levels, "overview": tiles.overview_level},
        "map": {
            "tile": map_tiles.TILE,
            "levels": map_.levels,
            "width": width_out,
            "height": height_out,
            "l0_per_px": result.run.plan.grid.l0_per_out,
        },
        "classes": [{"name": c.name, "color": _css(c.color), "area_mm2": c.area_mm2} for c in result.classes],
        # The kinds in the order of their labels.
        "left_out": None
        if result.left_out is None
        else [{"name": kind.title, "color": _css(kind.color)} for kind in LeftOut],
        "familiarity": None
        if result.familiarity is None or result.run.familiarity is None
        else {"l0_per_px": result.run.familiarity.l0_per_px, "color": _css(UNFAMILIAR)},
        "polygons": result.run.polygons,
        "tolerances": list(TOLERANCES_L0),
    }


def _css(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
