"""An independent, strict reader of the GeoJSON that QuPath can import: it shares no code with the writers.

One feature that breaks a rule makes QuPath refuse the whole file, or change it without a word. Features are read one
after the other: memory is that of the text, not of all its objects.
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
    """The text is not in QuPath's dialect."""


def check_geojson(text: str) -> list[dict[str, Any]]:
    """The features of one FeatureCollection that keeps every rule; raises RuleBrokenError for the first broken one."""
    kept = []
    for feature, broken in _checked(text):
        if broken:
            raise RuleBrokenError(broken)
        kept.append(feature)
    return kept


def broken_rules(text: str) -> tuple[int, list[str]]:
    """How many features a text holds and every broken rule in words, at most one for each feature.

    A text that is no FeatureCollection is read up to the place where that shows.
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
    """Each feature with the rule it breaks, or an empty text."""
    ids: set[str] = set()
    colors: dict[str, list[int]] = {}
    for feature in _features(text):
        try:
            _no_null(feature)
            _check_feature(feature)
            _require(feature["id"] not in ids, f"id {feature['id']} twice")
            ids.add(feature["id"])
            if classification := feature["properties"].get("classification"):
                same = colors.setdefault(classification["name"], classification["color"]) == classification["color"]
                _require(same, f"two colours of class {classification['name']}")
        except (RuleBrokenError, OverflowError) as error:
            yield feature, str(error)
        else:
            yield feature, ""


def _features(text: str) -> Iterator[Any]:
    """The members of `features` of a document that has this and `type`, and nothing else, in any order."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)

    def value(at: int) -> tuple[Any, int]:
        try:
            return decoder.raw_decode(text, _skip(text, at))
        except json.JSONDecodeError as error:
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
    _require(_skip(text, at) == len(text), "not one JSON document: something after its end")
    _require(sorted(map(str, keys)) == ["features", "type"], "not a bare FeatureCollection")


def _comma(text: str, at: int) -> tuple[bool, int]:
    """Whether a comma comes next, and where it goes on."""
    at = _skip(text, at)
    return (True, at + 1) if text.startswith(",", at) else (False, at)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _expect(text: str, at: int, mark: str, rule: str = "") -> int:
    at = _skip(text, at)
    _require(text.startswith(mark, at), rule or f"not one JSON document: no {mark} at character {at}")
    return at + len(mark)


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
    _require(properties.get("objectType") in ("annotation", "tile"), "objectType is neither annotation nor tile")
    # What a person could move by mistake has to be locked and of a class; a tile carries measurements.
    needed = {"isLocked", "classification"} if properties["objectType"] == "annotation" else {"measurements"}
    _require(needed <= set(properties), "a property is missing")
    _require(properties.get("isLocked", True) is True, "not locked")
    if "name" in properties:
        _require(isinstance(properties["name"], str) and properties["name"] != "", "name")
    if "classification" in properties:
        _check_classification(properties["classification"])
    measurements = properties.get("measurements", {})
    _require(isinstance(measurements, dict), "measurements")
    for value in measurements.values():
        _require(value == "NaN" or (type(value) in {int, float} and math.isfinite(value)), "measurement is no number")


def _check_classification(classification: Any) -> None:
    _require(isinstance(classification, dict) and set(classification) == {"name", "color"}, "classification's keys")
    name, color = classification["name"], classification["color"]
    _require(isinstance(name, str) and name.strip() != "" and ":" not in name, "class name")
    _require(isinstance(color, list) and len(color) == 3, "colour is not a list of three")
    _require(all(type(part) is int and 0 <= part <= 255 for part in color), "colour's parts")


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
