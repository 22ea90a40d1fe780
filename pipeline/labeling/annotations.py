"""Annotations that QuPath exported as GeoJSON: which of them count, by QuPath's own rules, and their shapes.

The rules are those of QuPath's pixel classifier (`PixelClassifierTraining`, `PathClassTools`): annotations with a class
and an area that are not locked; a class whose last part ends with * is ignored. Coordinates are level-0 pixels from the
corner of the slide's bounds.
"""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import shapely
from shapely import Point, affinity
from shapely.errors import ShapelyError
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from pipeline.errors import LabelingError
from pipeline.labeling.published_map import PublishedMap

OWN_MEASUREMENT = "Area mm^2"
"""The measurement of every region that wsi-segment writes. A region that has it is a prediction, not a label."""

ENDINGS = (".geojson", ".json", ".geojson.gz", ".json.gz", ".zip")

MOST_BYTES = 2 << 30
"""A larger file, unpacked, is refused."""


@dataclass(frozen=True)
class Annotation:
    """An annotation that counts."""

    name: tuple[str, ...]
    """The parts of its class: ("Tumor", "Positive") for the derived class "Tumor: Positive"."""
    shape: BaseGeometry
    """Polygons in level-0 pixels."""

    @property
    def is_ignored(self) -> bool:
        """Return whether QuPath ignores the class, such as Ignore*."""
        return self.name[-1].endswith("*")


@dataclass(frozen=True)
class Annotations:
    """The annotations of one file that count, and why others do not."""

    found: tuple[Annotation, ...]
    skipped: Mapping[str, int]
    """Reason -> number of objects."""


def read_annotations(file: Path, published: PublishedMap | None = None) -> Annotations:
    """Read a .geojson, .geojson.gz or .zip file, without hidden files. Raises LabelingError if it is not GeoJSON.

    Of annotations that a person made from a `published` map, only the changes count: the places to which the person
    gave another class than the map.
    """
    found: list[Annotation] = []
    skipped: Counter[str] = Counter()
    for content in _contents(file):
        for feature in _features(file, content):
            try:
                one = _annotation(feature, published)
            except (ShapelyError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                raise LabelingError(
                    f"{file}: an object cannot be read ({type(error).__name__}: {error}); export it again from QuPath"
                ) from error
            if isinstance(one, str):
                skipped[one] += 1
            else:
                found.append(one)
    return Annotations(tuple(found), dict(skipped))


def _contents(file: Path) -> Iterator[bytes]:
    try:
        if file.name.lower().endswith(".zip"):
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if not (member.is_dir() or _is_hidden(member.filename)):
                        with archive.open(member) as stream:
                            yield stream.read(MOST_BYTES + 1)
        elif file.name.lower().endswith(".gz"):
            with gzip.open(file) as stream:
                yield stream.read(MOST_BYTES + 1)
        else:
            yield file.read_bytes()
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise LabelingError(f"{file}: cannot be read ({error}); export the annotations again from QuPath") from error


def _is_hidden(member: str) -> bool:
    """Return whether a file in an archive is hidden. macOS adds such files, beside the others or below __MACOSX."""
    return member.startswith("__MACOSX/") or PurePosixPath(member).name.startswith(".")


def _features(file: Path, content: bytes) -> Iterable[Any]:
    """Return the objects of a FeatureCollection, of an array or of a single Feature."""
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 30} GiB")
        root = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LabelingError(f"{file}: is not GeoJSON ({error}); in QuPath: File > Export objects as GeoJSON") from error
    if isinstance(root, dict) and root.get("type") == "FeatureCollection" and isinstance(root.get("features"), list):
        return list(root["features"])
    if isinstance(root, dict) and root.get("type") == "Feature":
        return [root]
    if isinstance(root, list):
        return root
    raise LabelingError(
        f"{file}: is neither a FeatureCollection nor a list of features; in QuPath: File > Export objects as GeoJSON"
    )


def _annotation(feature: Any, published: PublishedMap | None) -> Annotation | str:
    """Return an annotation, or why it does not count."""
    # A person can give a locked region another class. If the region is one of this map, the change shows it.
    ours = published is not None and published.has(feature.get("id"))
    properties = feature.get("properties") or {}
    kind = properties.get("objectType") or properties.get("object_type") or "annotation"
    if kind != "annotation":
        return "not annotations"
    if not ours and OWN_MEASUREMENT in _measurements(properties):
        return "regions of wsi-segment, which are predictions"
    if not ours and properties.get("isLocked", False):
        return "locked; unlock them in QuPath if they are labels"
    name = class_name(properties.get("classification"))
    if not name:
        return "without a class"
    if name == ("Region*",):
        return "of class Region*"
    geometry = feature["geometry"]
    plane = geometry.get("plane") or {}
    if plane.get("z", 0) or plane.get("t", 0):
        return "on another plane than the first"
    polygons = _polygons(geometry)
    if polygons.area == 0:
        return "without an area"
    if published is not None:
        polygons = published.changed(": ".join(name), polygons)
    return Annotation(name, polygons) if polygons.area > 0 else "without a change"


def _measurements(properties: Mapping[str, Any]) -> set[str]:
    """Return the names of the measurements: keys of an object, or in older files entries of a list."""
    found = properties.get("measurements") or {}
    if isinstance(found, dict):
        return set(found)
    return {one["name"] for one in found}


def class_name(classification: Any) -> tuple[str, ...]:
    """Return the parts of a class, which is an object with `name` or `names`, a text, or None; () without a class."""
    if isinstance(classification, dict):
        classification = classification.get("names") or classification.get("name")
    if isinstance(classification, list):
        return tuple(str(part).strip() for part in classification)
    if not classification or not str(classification).strip():
        return ()
    return tuple(part.strip() for part in str(classification).split(":"))


def _polygons(geometry: Mapping[str, Any]) -> BaseGeometry:
    """Return the polygons of a geometry, valid and joined. Lines and points have no area and are left out."""
    if geometry["type"] == "GeometryCollection":
        return shapely.union_all([_polygons(part) for part in geometry["geometries"]])
    made = shape(geometry)
    if geometry.get("isEllipse"):
        return _ellipse(made)
    parts = shapely.get_parts(shapely.make_valid(made))
    return shapely.union_all([part for part in parts if part.geom_type in ("Polygon", "MultiPolygon")])


def _ellipse(box: BaseGeometry) -> BaseGeometry:
    """Return the ellipse in the bounding box of a shape, as QuPath reads it."""
    left, top, right, bottom = box.bounds
    circle = Point(0, 0).buffer(1, quad_segs=32)
    scaled = affinity.scale(circle, (right - left) / 2, (bottom - top) / 2, origin=(0, 0))
    return affinity.translate(scaled, (left + right) / 2, (top + bottom) / 2)
