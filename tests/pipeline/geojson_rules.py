"""An independent, strict reader of the GeoJSON that QuPath can import: it shares no code with the writer."""

from __future__ import annotations

import itertools
import json
import math
import uuid
from typing import Any, NoReturn

import shapely


class RuleBrokenError(ValueError):
    """The text is not in QuPath's dialect."""


def check_geojson(text: str) -> list[dict[str, Any]]:
    """The features of one FeatureCollection that keeps every rule; raises RuleBrokenError for the first broken one."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise RuleBrokenError(f"not one JSON document: {error}") from error
    _require(isinstance(document, dict) and set(document) == {"type", "features"}, "not a bare FeatureCollection")
    _require(document["type"] == "FeatureCollection", "type is not FeatureCollection")
    _require(isinstance(document["features"], list), "features is not a list")
    ids: set[str] = set()
    colors: dict[str, list[int]] = {}
    for feature in document["features"]:
        _no_null(feature)
        _check_feature(feature)
        _require(feature["id"] not in ids, f"id {feature['id']} twice")
        ids.add(feature["id"])
        classification = feature["properties"]["classification"]
        same = colors.setdefault(classification["name"], classification["color"]) == classification["color"]
        _require(same, f"two colours of class {classification['name']}")
    return list(document["features"])


def _check_feature(feature: Any) -> None:
    _require(isinstance(feature, dict) and set(feature) == {"type", "id", "geometry", "properties"}, "feature's keys")
    _require(feature["type"] == "Feature", "type is not Feature")
    _require(isinstance(feature["id"], str), "id is no text")
    try:
        canonical = str(uuid.UUID(feature["id"]))
    except ValueError as error:
        raise RuleBrokenError("id is no UUID") from error
    _require(canonical == feature["id"], "id is not a UUID in its usual form")
    _check_properties(feature["properties"])
    _check_polygon(feature["geometry"])


def _check_properties(properties: Any) -> None:
    known = {"objectType", "name", "isLocked", "classification", "measurements"}
    _require(isinstance(properties, dict) and set(properties) <= known, "unknown properties, or none")
    _require({"objectType", "isLocked", "classification"} <= set(properties), "a property is missing")
    _require(properties["objectType"] == "annotation", "objectType is not annotation")
    _require(properties["isLocked"] is True, "not locked")
    if "name" in properties:
        _require(isinstance(properties["name"], str) and properties["name"] != "", "name")
    classification = properties["classification"]
    _require(isinstance(classification, dict) and set(classification) == {"name", "color"}, "classification's keys")
    name, color = classification["name"], classification["color"]
    _require(isinstance(name, str) and name.strip() != "" and ":" not in name, "class name")
    _require(isinstance(color, list) and len(color) == 3, "colour is not a list of three")
    _require(all(type(part) is int and 0 <= part <= 255 for part in color), "colour's parts")
    measurements = properties.get("measurements", {})
    _require(isinstance(measurements, dict), "measurements")
    for value in measurements.values():
        _require(value == "NaN" or (type(value) in {int, float} and math.isfinite(value)), "measurement is no number")


def _check_polygon(geometry: Any) -> None:
    _require(isinstance(geometry, dict) and set(geometry) == {"type", "coordinates"}, "geometry's keys")
    _require(geometry["type"] == "Polygon", "geometry is not a Polygon")
    rings = geometry["coordinates"]
    _require(isinstance(rings, list) and len(rings) > 0, "no rings")
    for number, ring in enumerate(rings):
        _require(isinstance(ring, list) and len(ring) >= 4, "ring of fewer than four positions")
        for position in ring:
            _require(isinstance(position, list) and len(position) == 2, "position is not [x, y]")
            for value in position:
                _require(type(value) in {int, float} and math.isfinite(value), "coordinate is no number")
                _require(float(value) == round(float(value), 2), "coordinate off the 0.01 grid")
        _require(ring[0] == ring[-1], "ring not closed")
        _require(all(a != b for a, b in itertools.pairwise(ring)), "position repeated")
        doubled = sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring))
        _require(doubled > 0 if number == 0 else doubled < 0, "ring against the right-hand rule")
    _require(shapely.is_valid(shapely.Polygon(rings[0], rings[1:])), "polygon not valid")


def _no_null(value: Any) -> None:
    _require(value is not None, "null")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _no_null(part)


def _refuse_constant(name: str) -> NoReturn:
    raise RuleBrokenError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require(len({key for key, _ in pairs}) == len(pairs), "key twice")
    return dict(pairs)


def _require(kept: bool, rule: str) -> None:
    if not kept:
        raise RuleBrokenError(rule)
