"""A picture of the slide at the size of a page, with the class of each pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.formats.familiarity import FamiliarityMap
from pipeline.formats.ome_zarr import LABELS, MapStore, UInt8Array
from wsi.grid import Grid
from wsi.levels import pick_level
from wsi.slide import Slide
from wsi.thumbnail import read_thumbnail
from wsi.tissue import Tissue

LONGEST_PX = 1600
"""Largest length of a picture's longer side."""


@dataclass(frozen=True)
class SlidePicture:
    """The slide inside its bounds and the class of each pixel. Never the slide's label or macro image."""

    rgb_HWC: UInt8Array
    labels_HW: UInt8Array
    """0 background, 1.. in the order of `classes`."""
    left_out_HW: UInt8Array
    """The `LeftOut` of each pixel, or 0."""
    classes: tuple[TissueClass, ...]
    um_per_px: float
    unfamiliar_HW: NDArray[np.bool_] | None = None
    """The tissue that does not look like the model's training data; None if that is not known."""


def picture_slide(
    slide: Slide, tissue: Tissue, grid: Grid, store: MapStore, familiarity: FamiliarityMap | None = None
) -> SlidePicture:
    """Return the slide and its stored classes, at most LONGEST_PX long. The map must have its pyramid."""
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
    out_per_px = [
        thumb * l0_per_thumb / pixels / grid.l0_per_out
        for thumb, pixels in ((thumb_width, width), (thumb_height, height))
    ]
    columns_out, rows_out = (
        np.minimum(((np.arange(pixels) + 0.5) * per_px).astype(int), length - 1)
        for pixels, per_px, length in zip((width, height), out_per_px, store.spec.size_out, strict=True)
    )
    return SlidePicture(
        rgb_HWC,
        _labels(store, columns_out, rows_out, min(out_per_px)),
        _left_out(tissue, columns_out, rows_out, grid.l0_per_out),
        store.spec.classes,
        out_per_px[0] * grid.l0_per_out * info.mpp,
        None if familiarity is None else familiarity.at(columns_out, rows_out),
    )


def _labels(
    store: MapStore, columns_out: NDArray[np.int64], rows_out: NDArray[np.int64], out_per_px: float
) -> UInt8Array:
    """Return the class at these columns and rows of the map, from the coarsest level that is fine enough."""
    level = pick_level([2**level for level in range(store.spec.levels)], out_per_px)
    labels = zarr.open_array(store.path / LABELS / str(level), mode="r")
    return np.asarray(labels[:], dtype=np.uint8)[np.ix_(rows_out // 2**level, columns_out // 2**level)]


def _left_out(
    tissue: Tissue, columns_out: NDArray[np.int64], rows_out: NDArray[np.int64], l0_per_out: float
) -> UInt8Array:
    """Return the kind of left-out area at these columns and rows of the map."""
    columns, rows = (
        np.minimum(((places + 0.5) * l0_per_out / tissue.l0_per_px).astype(int), length - 1)
        for places, length in zip((columns_out, rows_out), tissue.left_out_HW.shape[::-1], strict=True)
    )
    return tissue.left_out_HW[np.ix_(rows, columns)]
