"""A strict reader of the GeoJSON that QuPath can import. It shares no code with the writers on purpose.

One feature that breaks a rule makes QuPath reject the whole file, or change it silently. Features are read one by one,
so memory holds the text and a single feature.
"""

from __future__ import annotations

import itertools
import json
import math
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

import shapely

_SPACE = " \t\r\n"


class RuleBrokenError(ValueError):
    """The text breaks a rule of QuPath's GeoJSON dialect."""


def broken_geojson_rules(text: str) -> tuple[int, list[str]]:
    """Return the number of features in a text and the broken rules, at most one per feature.

    Reading stops at the first error outside a feature.
    """
    count, found = 0, []
    try:
        for number, (_, broken) in enumerate(_checked(text)):
            count += 1
            if broken:
                found.append(f"feature {number}: {broken}")
    except RuleBrokenError as error:
        found.append(str(error))
    return count, found


def _checked(text: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each feature with the rule that it breaks, or an empty string."""
    ids: set[str] = set()
    colors: dict[str, list[int]] = {}
    for feature in _features(text):
        try:
            _no_null(feature)
            _check_feature(feature)
            _require(feature["id"] not in ids, f"id {feature['id']} occurs twice")
            ids.add(feature["id"])
            if classification := feature["properties"].get("classification"):
                same = colors.setdefault(classification["name"], classification["color"]) == classification["color"]
                _require(same, f"two colors for class {classification['name']}")
        except (RuleBrokenError, OverflowError) as error:
            yield feature, str(error)
        else:
            yield feature, ""


def _features(text: str) -> Iterator[Any]:
    """Yield the members of `features` from a document whose only keys are `features` and `type`, in any order."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)

    def value(at: int) -> tuple[Any, int]:
        try:
            return decoder.raw_decode(text, _skip(text, at))
        except RuleBrokenError:
            raise
        except ValueError as error:  # also for a number with more digits than Python converts
            raise RuleBrokenError(f"not one JSON document: {error}") from error

    keys: list[str] = []
    at = _expect(text, 0, "{")
    while True:
        key, at = value(at)
        keys.append(key)
        at = _expect(text, at, ":")
        if key == "features":
            at = _expect(text, at, "[", "features is not a list")
            more = not text.startswith("]", _skip(text, at))
            while more:
                feature, at = value(at)
                yield feature
                more, at = _comma(text, at)
            at = _expect(text, at, "]")
        else:
            found, at = value(at)
            _require(key != "type" or found == "FeatureCollection", "type is not FeatureCollection")
        more, at = _comma(text, at)
        if not more:
            break
    at = _expect(text, at, "}")
    _require(_skip(text, at) == len(text), "not one JSON document: text after the end")
    _require(sorted(map(str, keys)) == ["features", "type"], "not a bare FeatureCollection")


def _comma(text: str, at: int) -> tuple[bool, int]:
    """Return whether a comma follows, and the position to continue at."""
    at = _skip(text, at)
    return (True, at + 1) if text.startswith(",", at) else (False, at)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _expect(text: str, at: int, mark: str, rule: str = "") -> int:
    at = _skip(text, at)
    _require(text.startswith(mark, at), rule or f"not one JSON document: {mark} is missing at character {at}")
    return at + len(mark)


def _check_feature(feature: Any) -> None:
    keys = {"type", "id", "geometry", "properties"}
    _require(isinstance(feature, dict) and set(feature) == keys, "feature has other keys")
    _require(feature["type"] == "Feature", "type is not Feature")
    _require(isinstance(feature["id"], str), "id is not a string")
    try:
        canonical = str(uuid.UUID(feature["id"]))
    except ValueError as error:
        raise RuleBrokenError("id is not a UUID") from error
    _require(canonical == feature["id"], "id is not a UUID in canonical form")
    _check_properties(feature["properties"])
    _check_polygon(feature["geometry"])


def _check_properties(properties: Any) -> None:
    known = {"objectType", "name", "isLocked", "classification", "measurements"}
    _require(isinstance(properties, dict) and set(properties) <= known, "properties has other keys")
    _require(properties.get("objectType") in ("annotation", "tile"), "objectType is neither annotation nor tile")
    # An annotation must be locked, because a user could move it by mistake. A tile only carries measurements.
    needed = {"isLocked", "classification"} if properties["objectType"] == "annotation" else {"measurements"}
    _require(needed <= set(properties), "a property is missing")
    _require(properties.get("isLocked", True) is True, "isLocked is not true")
    if "name" in properties:
        _require(isinstance(properties["name"], str) and properties["name"] != "", "name is not a non-empty string")
    if "classification" in properties:
        _check_classification(properties["classification"])
    measurements = properties.get("measurements", {})
    _require(isinstance(measurements, dict), "measurements is not an object")
    for value in measurements.values():
        number = type(value) in {int, float} and math.isfinite(value)
        _require(number or value == "NaN", "measurement is not a number")


def _check_classification(classification: Any) -> None:
    keys = {"name", "color"}
    _require(isinstance(classification, dict) and set(classification) == keys, "classification has other keys")
    name, color = classification["name"], classification["color"]
    _require(isinstance(name, str) and name.strip() != "" and ":" not in name, "class name is empty or has a colon")
    _require(isinstance(color, list) and len(color) == 3, "color is not a list of three")
    _require(all(type(part) is int and 0 <= part <= 255 for part in color), "color has parts outside 0-255")


def _check_polygon(geometry: Any) -> None:
    _require(isinstance(geometry, dict) and set(geometry) == {"type", "coordinates"}, "geometry has other keys")
    _require(geometry["type"] == "Polygon", "geometry is not a Polygon")
    rings = geometry["coordinates"]
    _require(isinstance(rings, list) and len(rings) > 0, "polygon has no rings")
    for number, ring in enumerate(rings):
        _require(isinstance(ring, list) and len(ring) >= 4, "ring has fewer than four positions")
        for position in ring:
            _require(isinstance(position, list) and len(position) == 2, "position is not [x, y]")
            for value in position:
                _require(type(value) in {int, float} and math.isfinite(value), "coordinate is not a number")
                _require(float(value) == round(float(value), 2), "coordinate is not a multiple of 0.01")
        _require(ring[0] == ring[-1], "ring is not closed")
        _require(all(a != b for a, b in itertools.pairwise(ring)), "position is repeated")
        doubled = sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring))
        _require(doubled > 0 if number == 0 else doubled < 0, "ring violates the right-hand rule")
    _require(shapely.is_valid(shapely.Polygon(rings[0], rings[1:])), "polygon is not valid")


def _no_null(value: Any) -> None:
    _require(value is not None, "value is null")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _no_null(part)


def _refuse_constant(name: str) -> NoReturn:
    raise RuleBrokenError(f"{name} is not valid JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require(len({key for key, _ in pairs}) == len(pairs), "key occurs twice")
    return dict(pairs)


def _require(kept: bool, rule: str) -> None:
    if not kept:
        raise RuleBrokenError(rule)
