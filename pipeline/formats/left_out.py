"""Write the areas beside plain tissue (folds, pen, dust and others) as GeoJSON for QuPath.

The file is separate from that of the classes, so that nobody counts these areas as results. The names of its classes
end with "*": QuPath ignores such classes in measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from models.tissue_class import TissueClass
from pipeline.formats.features import geojson_feature, geojson_text, region_features
from pipeline.formats.polygons import Region, block_regions, join_regions
from wsi.left_out import LeftOut
from wsi.tissue import Tissue

CLASSES = tuple(TissueClass(f"{kind.title}*", kind.color) for kind in LeftOut)
"""The classes of the file, in the order of `LeftOut`: kind k has label k."""

BLOCK_PX = 512
"""Side of the blocks in which the layer is traced, in its pixels."""


def write_left_out(path: Path, tissue: Tissue, size_l0: tuple[int, int], mpp_l0: float, slide_digest: str) -> None:
    """Write the layer `left_out_HW` of a slide with pixels of `mpp_l0` micrometers as locked annotations.

    `size_l0` is (width, height) of the slide's bounds. Coordinates are those of the classes' polygons.
    """
    features = region_features(_regions(tissue), CLASSES, tissue.l0_per_px, size_l0, mpp_l0, slide_digest)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(geojson_text(geojson_feature(feature) for feature in features))


def _regions(tissue: Tissue) -> Iterator[Region]:
    """Yield the regions of the layer, traced block by block: the whole layer of a large slide takes 600 MB."""
    height, width = tissue.left_out_HW.shape
    pieces = (
        piece
        for y, x in product(range(0, height, BLOCK_PX), range(0, width, BLOCK_PX))
        for piece in block_regions(
            tissue.left_out_HW[y : y + BLOCK_PX, x : x + BLOCK_PX],
            origin_out=(x, y),
            min_area_px=0,
            tolerance_px=0,  # so that the areas stay those of `LeftOutArea`
        )
    )
    return join_regions(pieces, 0)
