"""Run records for tests that need no segmentation."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.tissue_class import TissueClass
from pipeline.results.record import PlanFacts, Run, RunIdentity, SlideFacts, TileCounts
from wsi.box import Box
from wsi.grid import Grid

IDENTITY = RunIdentity(format=5, slide="5" * 64, model="e" * 64, parameters={"mpp": None, "canvas_m": 896})
TUMOR, STROMA = TissueClass("tumor", (255, 0, 0)), TissueClass("stroma", (0, 0, 255))
GRID = Grid(
    level=1, origin_lv=(0, 0), l0_per_lv=2.0, lv_per_m=1.0, mpp_m=1.0, size_m=(6000, 4000), tile_m=256,
    m_per_out=4, block_out=1024,
)  # fmt: skip


def make_run(name: str = "slide", **facts: Any) -> Run:
    """Return the record of a slide of 12000×8000 pixels with a quarter of tumor; `facts` replace its fields."""
    classes = facts.pop("classes", (TUMOR, STROMA))
    values = {
        "identity": IDENTITY,
        "status": "done",
        "slide": SlideFacts(
            name=f"{name}.svs", path=Path("slides", f"{name}.svs"), size=(12000, 8000), mpp=0.5, mpp_source="slide",
            vendor="aperio", backend="openslide", bounds=Box(0, 0, 12000, 8000), qupath_offset=(0, 0),
        ),
        "model": "colon",
        "tissue_mm2": 1.5,
        "fold_mm2": 0.0,
        "classes": classes,
        "class_areas_mm2": dict(zip((one.name for one in classes), (0.25, 0.75), strict=False)),
        "polygons": 1234,
        "tiles": TileCounts(run=400, segmented=100, without_class=8, unreadable=0),
        "bad_tiles_l0": (),
        "warnings": (),
        "plan": PlanFacts(grid=GRID, blocks=2, tiles=400, tissue_mm2=1.5, memory_bytes=1 << 30, disk_bytes=1 << 20),
        "resumed_blocks": 0,
        "device": "cpu",
        "seconds": {"plan": 0.5, "blocks": 60.0, "total": 75.0},
        "versions": {"torch": "2", "openvino": "3", "wsi-segment": version("wsi-segment")},
        "outputs": (f"{name}.geojson", "index.html", "run.json", "thumbnail.jpg"),
    }  # fmt: skip
    return Run.model_validate(values | facts)
