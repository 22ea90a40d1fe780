"""The regions of a result as QuPath and wsi-view show them, to find what a person changed about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from pipeline.formats.features import Feature

SLIVER_L0 = 1.0
"""Parts of a change that are nowhere wider than this many level-0 pixels are rounding, not the work of a person."""


class PublishedMap:
    """The regions of one result."""

    def __init__(self, features: Iterable[Feature]) -> None:
        by_class: dict[str, list[shapely.Polygon]] = defaultdict(list)
        self._ids = set()
        for feature in features:
            self._ids.add(feature.id)
            by_class[feature.tissue_class.name].append(feature.geometry_l0)
        self._trees = {name: shapely.STRtree(polygons) for name, polygons in by_class.items()}

    def has(self, region: object) -> bool:
        """Return whether a region with this id was published. A person may have changed it since."""
        return region in self._ids

    def changed(self, class_name: str, shape_l0: BaseGeometry) -> BaseGeometry:
        """Return the part of a shape of this class in which the map has another class or none, as polygons."""
        tree = self._trees.get(class_name)
        if tree is None:
            return shape_l0
        same = tree.geometries[tree.query(shape_l0, predicate="intersects")]
        parts = shapely.get_parts(shapely.difference(shape_l0, shapely.union_all(same)))
        wide = ~shapely.is_empty(shapely.buffer(parts, -SLIVER_L0 / 2))
        return shapely.union_all(np.asarray(parts)[wide])
