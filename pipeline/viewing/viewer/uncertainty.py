"""How uncertain a model is about each region: one minus the mean probability of the region's class inside it.

Shape suffixes: H, W pixels of the map, N regions, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.features import Feature
from pipeline.formats.raster import rasterize

MOST_PIXELS = 4_000_000
"""Pixels of the level of the map in which regions are measured."""


def uncertainties(features: Sequence[Feature], probs_CHW: NDArray[np.uint8], l0_per_px: float) -> NDArray[np.float32]:
    """Return the uncertainty of each region, (N,), between 0 and 1.

    probs_CHW: probabilities times 255. l0_per_px: level-0 pixels per pixel of `probs_CHW`. A region that is smaller
    than a pixel is measured at one point inside it.
    """
    if not features:
        return np.zeros(0, np.float32)
    label_N = np.array([one.label for one in features])
    polygons_l0 = ((number, one.geometry_l0) for number, one in enumerate(features, start=1))
    height, width = probs_CHW.shape[1:]
    owner_HW = rasterize(polygons_l0, (height, width), (l0_per_px, l0_per_px))
    inside_HW = owner_HW > 0
    owner = owner_HW[inside_HW] - 1
    own = probs_CHW[:, inside_HW][label_N[owner] - 1, np.arange(owner.size)]
    count_N = np.bincount(owner, minlength=len(features))
    sum_N = np.bincount(owner, own, minlength=len(features))
    last_yx = np.subtract(probs_CHW.shape[1:], 1).tolist()
    for n in np.flatnonzero(count_N == 0).tolist():
        point = features[n].geometry_l0.representative_point()
        y, x = (min(int(value / l0_per_px), last) for value, last in zip((point.y, point.x), last_yx, strict=True))
        sum_N[n], count_N[n] = probs_CHW[label_N[n] - 1, y, x], 1
    return np.asarray(1 - sum_N / count_N / 255, np.float32)
