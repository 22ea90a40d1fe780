"""A picture of the slide at the size of a page, with the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.formats.familiarity import FamiliarityMap
from pipeline.formats.features import Feature
from pipeline.formats.ome_zarr import MapSpec
from pipeline.formats.raster import rasterize
from wsi.grid import Grid
from wsi.slide import Slide
from wsi.thumbnail import read_thumbnail
from wsi.tissue import Tissue

LONGEST_PX = 1600
"""Largest length of a picture's longer side."""


@dataclass(frozen=True)
class SlidePicture:
    """The slide inside its bounds and the class of each pixel. Never the slide's label or macro image."""

    rgb_HWC: NDArray[np.uint8]
    labels_HW: NDArray[np.uint8]
    """The class of the polygon at each pixel's center: 0 for none, 1.. in the order of `classes`."""
    left_out_HW: NDArray[np.uint8]
    """The `LeftOut` of each pixel, or 0."""
    classes: tuple[TissueClass, ...]
    um_per_px: float
    unfamiliar_HW: NDArray[np.bool_] | None = None
    """The tissue that does not look like the model's training data; None if that is not known."""


def picture_slide(
    slide: Slide,
    tissue: Tissue,
    grid: Grid,
    spec: MapSpec,
    features: Iterable[Feature],
    familiarity: FamiliarityMap | None = None,
) -> SlidePicture:
    """Return the slide and the classes of its published polygons, at most LONGEST_PX long.

    The label image would also show regions that are too small for a polygon, which no area counts.
    """
    info = slide.info
    longest_um = max(info.bounds_l0.width, info.bounds_l0.height) * info.mpp
    rgb_HWC, l0_per_thumb, *_ = read_thumbnail(slide, max(info.mpp, longest_um / LONGEST_PX))
    thumb_height, thumb_width = rgb_HWC.shape[:2]
    if max(thumb_height, thumb_width) > LONGEST_PX:
        # The reader only reduces by whole factors.
        image = Image.fromarray(rgb_HWC)
        image.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.LANCZOS)
        rgb_HWC = np.asarray(image)
    height, width = rgb_HWC.shape[:2]
    l0_per_px = thumb_width * l0_per_thumb / width, thumb_height * l0_per_thumb / height
    columns_out, rows_out = (
        np.minimum(((np.arange(pixels) + 0.5) * per_px / grid.l0_per_out).astype(int), length - 1)
        for pixels, per_px, length in zip((width, height), l0_per_px, spec.size_out, strict=True)
    )
    polygons_l0 = ((feature.label, feature.geometry_l0) for feature in features)
    labels_HW = rasterize(polygons_l0, (height, width), l0_per_px)
    return SlidePicture(
        rgb_HWC,
        labels_HW.astype(np.uint8),
        _left_out(tissue, columns_out, rows_out, grid.l0_per_out),
        spec.classes,
        l0_per_px[0] * info.mpp,
        None if familiarity is None else familiarity.at(columns_out, rows_out),
    )


def _left_out(
    tissue: Tissue, columns_out: NDArray[np.int64], rows_out: NDArray[np.int64], l0_per_out: float
) -> NDArray[np.uint8]:
    """Return the kind of left-out area at these columns and rows of the map."""
    columns, rows = (
        np.minimum(((places + 0.5) * l0_per_out / tissue.l0_per_px).astype(int), length - 1)
        for places, length in zip((columns_out, rows_out), tissue.left_out_HW.shape[::-1], strict=True)
    )
    return tissue.left_out_HW[np.ix_(rows, columns)]
