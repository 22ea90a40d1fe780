"""Label maps for tests of polygons, and polygons turned back into labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.formats.polygons import Region

Labels = npt.NDArray[np.uint8]


@st.composite
def label_maps(draw: st.DrawFn, max_side: int = 14, classes: int = 3) -> Labels:
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    values = draw(st.lists(st.integers(0, classes), min_size=height * width, max_size=height * width))
    return np.array(values, np.uint8).reshape(height, width)


def smooth_map(side: int, sigma: float, classes: int = 4, seed: int = 0) -> Labels:
    """Return the number of the largest of several smooth random fields, 0..classes-1: regions with round borders."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.standard_normal((side, side)), sigma) for _ in range(classes)]
    labels_HW: Labels = np.argmax(fields, axis=0).astype(np.uint8)
    return labels_HW


def rasterized(regions: Sequence[Region], shape: tuple[int, int], origin_out: tuple[int, int] = (0, 0)) -> Labels:
    """Return labels: each pixel has the label of the polygon that contains its center, by the even-odd rule."""
    labels_HW = np.zeros(shape, np.uint8)
    for region in regions:
        inside_HW = np.zeros(shape, np.bool_)
        for ring in (region.geometry_out.exterior, *region.geometry_out.interiors):
            for (x0, y0), (x1, y1) in zip(ring.coords[:-1], ring.coords[1:], strict=True):
                for row in range(shape[0]):
                    y = origin_out[1] + row + 0.5
                    if min(y0, y1) < y < max(y0, y1):
                        x = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
                        inside_HW[row] ^= origin_out[0] + np.arange(shape[1]) + 0.5 > x
        assert not labels_HW[inside_HW & (labels_HW > 0)].any(), "two classes on one pixel"
        labels_HW[inside_HW] = region.label
    return labels_HW


def geometries(regions: Sequence[Region]) -> npt.NDArray[np.object_]:
    return np.array([region.geometry_out for region in regions], dtype=object)
