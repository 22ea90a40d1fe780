"""Read the polygons of a GeoJSON file that breaks no rule."""

from __future__ import annotations

import json
from typing import Any

from pipeline.checks.geojson import broken_geojson_rules


def checked_features(text: str) -> list[dict[str, Any]]:
    """Return the features of one FeatureCollection, after the checks that `wsi-export check` runs."""
    count, broken = broken_geojson_rules(text)
    assert broken == []
    features: list[dict[str, Any]] = json.loads(text)["features"]
    assert len(features) == count
    return features
