"""A picture of the slide at the size of a page, with the class of each pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zarr
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.formats.ome_zarr import LABELS, MapStore, UInt8Array
from wsi.grid import Grid
from wsi.levels import pick_level
from wsi.slide import Slide
from wsi.tissue import read_thumbnail

LONGEST_PX = 1600
"""Largest length of a picture's longer side."""


@dataclass(frozen=True)
class SlidePicture:
    """The slide inside its bounds and the class of each pixel. Never the slide's label or macro image."""

    rgb_HWC: UInt8Array
    labels_HW: UInt8Array
    """0 background, 1.. in the order of `classes`."""
    classes: tuple[TissueClass, ...]
    um_per_px: float


def picture_slide(slide: Slide, grid: Grid, store: MapStore) -> SlidePicture:
    """Return the slide and its stored classes, at most LONGEST_PX long. The map must have its pyramid."""
    info = slide.info
    longest_um = max(info.bounds_l0.width, info.bounds_l0.height) * info.mpp
    rgb_HWC, l0_per_thumb, _ = read_thumbnail(slide, max(info.mpp, longest_um / LONGEST_PX))
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
    labels_HW = _labels(store, (width, height), out_per_px)
    return SlidePicture(rgb_HWC, labels_HW, store.spec.classes, out_per_px[0] * grid.l0_per_out * info.mpp)


def _labels(store: MapStore, size: tuple[int, int], out_per_px: list[float]) -> UInt8Array:
    """Return the class at the center of each pixel of a picture, from the coarsest level that is fine enough."""
    spec = store.spec
    level = pick_level([2**level for level in range(spec.levels)], min(out_per_px))
    columns, rows = (
        np.minimum(((np.arange(pixels) + 0.5) * per_px).astype(int), length - 1) // 2**level
        for pixels, per_px, length in zip(size, out_per_px, spec.size_out, strict=True)
    )
    labels = zarr.open_array(store.path / LABELS / str(level), mode="r")
    return np.asarray(labels[:], dtype=np.uint8)[np.ix_(rows, columns)]
