"""The published polygons: QuPath's GeoJSON and GeoParquet."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tissue_class import TissueClass
from pipeline.checks.geojson import broken_geojson_rules
from pipeline.formats.features import measure_features, region_features, write_features
from pipeline.formats.polygons import Region, block_regions, join_regions
from tests.pipeline.features import checked_features

CLASSES = (
    TissueClass("Tumor", (200, 0, 0)),
    TissueClass("Stroma, ä", (0, 200, 0)),
    TissueClass("Necrosis", (0, 0, 200)),
)
HUGE = (1 << 20, 1 << 20)
HOLED = shapely.Polygon(shapely.box(0, 0, 10, 8).exterior, [shapely.box(2, 2, 4, 4).exterior])


def written(folder: Path, regions: Any, l0_per_out: float = 4.0, digest: str = "abc") -> int:
    write_features(folder / "s.geojson", folder / "s.parquet", regions, CLASSES, l0_per_out, HUGE, 0.5, digest)
    return measure_features(folder / "s.parquet", CLASSES)[0]


def areas_mm2(features: list[dict[str, Any]]) -> list[float]:
    return [feature["properties"]["measurements"]["Area mm^2"] for feature in features]


def features_of(folder: Path) -> list[dict[str, Any]]:
    return checked_features((folder / "s.geojson").read_text(encoding="utf-8"))


def some_regions(seed: int = 0) -> list[Region]:
    labels_HW = np.random.default_rng(seed).integers(0, 4, (24, 24), dtype=np.uint8)
    return list(join_regions(block_regions(labels_HW, (100, 200), 3, 1.0), 3))


def test_feature_is_what_qupath_reads(tmp_path: Path) -> None:
    count = written(tmp_path, [Region(2, HOLED, False)])
    (feature,) = features_of(tmp_path)
    assert feature["properties"] == {
        "objectType": "annotation",
        "isLocked": True,
        "classification": {"name": "Stroma, ä", "color": [0, 200, 0]},
        "measurements": {"Area mm^2": pytest.approx(76 * 16 * 0.25e-6)},
    }
    shell, hole = feature["geometry"]["coordinates"]
    assert {tuple(xy) for xy in shell} == {(0, 0), (40, 0), (40, 32), (0, 32)}
    assert {tuple(xy) for xy in hole} == {(8, 8), (16, 8), (16, 16), (8, 16)}
    assert count == 1


@given(st.integers(0, 10_000), st.floats(0.05, 40))
def test_every_file_keeps_every_rule(tmp_path_factory: pytest.TempPathFactory, seed: int, l0_per_out: float) -> None:
    folder = tmp_path_factory.mktemp("features")
    regions = some_regions(seed)
    count = written(folder, regions, l0_per_out)
    features = features_of(folder)
    assert len(features) == count >= len(regions)
    area_mm2 = sum(region.geometry_out.area for region in regions) * (l0_per_out * 0.5e-3) ** 2
    assert sum(areas_mm2(features)) == pytest.approx(area_mm2, rel=0.02 / l0_per_out)


def test_coordinates_are_rounded_to_the_grid_of_qupath(tmp_path: Path) -> None:
    written(tmp_path, [Region(1, shapely.box(1, 2, 4, 5), False)], 4.00123)
    (feature,) = features_of(tmp_path)
    assert {tuple(xy) for xy in feature["geometry"]["coordinates"][0]} == {(4, 8), (16, 8), (16, 20.01), (4, 20.01)}


def test_a_polygon_that_rounding_splits_becomes_several_features(tmp_path: Path) -> None:
    waist = shapely.Polygon([(0, 0), (2, 0.999), (4, 0), (4, 2), (2, 1.001), (0, 2)])
    count = written(tmp_path, [Region(1, waist, False)], 1.0)
    features = features_of(tmp_path)
    assert count == len(features) == 2
    assert len({feature["id"] for feature in features}) == 2
    assert sum(areas_mm2(features)) == pytest.approx(4 * 0.25e-6)


def test_a_polygon_that_rounding_erases_is_omitted(tmp_path: Path) -> None:
    assert written(tmp_path, [Region(1, shapely.box(1, 1, 2, 2), False)], 0.001) == 0
    assert features_of(tmp_path) == []


def test_no_regions_give_two_valid_empty_files(tmp_path: Path) -> None:
    assert written(tmp_path, []) == 0
    assert json.loads((tmp_path / "s.geojson").read_text()) == {"type": "FeatureCollection", "features": []}
    assert features_of(tmp_path) == []
    frame = geopandas.read_parquet(tmp_path / "s.parquet")
    assert len(frame) == 0
    assert list(frame.columns) == ["id", "class", "label", "area_mm2", "geometry"]


def test_geopandas_reads_the_same_geometries(tmp_path: Path) -> None:
    written(tmp_path, some_regions(), 3.97)
    frame = geopandas.read_parquet(tmp_path / "s.parquet")
    features = features_of(tmp_path)
    assert frame.crs is None
    assert list(frame["id"]) == [feature["id"] for feature in features]
    assert list(frame["class"]) == [feature["properties"]["classification"]["name"] for feature in features]
    assert [CLASSES[label - 1].name for label in frame["label"]] == list(frame["class"])
    assert list(frame["area_mm2"]) == [feature["properties"]["measurements"]["Area mm^2"] for feature in features]
    for polygon, feature in zip(frame.geometry, features, strict=True):
        rings = [ring.coords for ring in (polygon.exterior, *polygon.interiors)]
        assert [[list(xy) for xy in ring] for ring in rings] == feature["geometry"]["coordinates"]


def test_geoparquet_metadata_follow_its_specification(tmp_path: Path) -> None:
    written(tmp_path, some_regions())
    geo = json.loads(pq.read_schema(tmp_path / "s.parquet").metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert geo["primary_column"] == "geometry"
    assert geo["columns"]["geometry"]["encoding"] == "WKB"
    assert geo["columns"]["geometry"]["geometry_types"] == ["Polygon"]
    assert geo["columns"]["geometry"]["crs"] is None


def test_the_area_of_a_class_is_the_sum_of_its_regions(tmp_path: Path) -> None:
    regions = some_regions()
    count = written(tmp_path, regions)
    wanted_mm2 = {
        one.name: sum(region.geometry_out.area for region in regions if region.label == label) * (4 * 0.5e-3) ** 2
        for label, one in enumerate(CLASSES, start=1)
    }
    stored, found_mm2 = measure_features(tmp_path / "s.parquet", CLASSES)
    assert stored == count
    assert found_mm2 == pytest.approx(wanted_mm2)
    written(tmp_path, [])
    assert measure_features(tmp_path / "s.parquet", CLASSES) == (0, dict.fromkeys(wanted_mm2, 0.0))


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.0, 1.0, 3.0]))
def test_no_polygon_passes_the_slide_and_neighbors_stay_neighbors(
    seed: int, beyond_x: int, beyond_y: int, tolerance: float
) -> None:
    """The slide ends inside the last column and row of the map, whose pixels have four level-0 pixels."""
    labels_HW = np.random.default_rng(seed).integers(1, 4, (12, 16), dtype=np.uint8)
    labels_HW = np.kron(labels_HW, np.ones((2, 2), np.uint8))
    size_l0 = (4 * 32 - beyond_x + 1, 4 * 24 - beyond_y + 1)
    regions = block_regions(labels_HW, (0, 0), 1, tolerance)
    polygons = [one.geometry_l0 for one in region_features(regions, CLASSES, 4.0, size_l0, 0.5, "abc")]
    assert shapely.total_bounds(polygons).tolist() == [0, 0, *size_l0]
    # They cover the slide, and no two overlap.
    assert shapely.union_all(polygons).equals(shapely.box(0, 0, *size_l0))
    assert sum(polygon.area for polygon in polygons) == pytest.approx(size_l0[0] * size_l0[1])


def test_same_regions_give_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, some_regions())
    for name in ("s.geojson", "s.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_ids_depend_on_slide_class_and_place() -> None:
    def identity(region: Region, digest: str = "abc") -> str:
        (feature,) = region_features([region], CLASSES, 4.0, HUGE, 0.5, digest)
        return feature.id

    region = Region(1, HOLED, False)
    assert identity(region) == identity(Region(1, shapely.reverse(HOLED), True))
    others = [
        identity(Region(2, HOLED, False)),
        identity(Region(1, shapely.box(0, 0, 10, 8), False)),
        identity(region, "abd"),
    ]
    assert len({identity(region), *others}) == 4


@pytest.mark.full
def test_memory_does_not_grow_with_the_number_of_regions(tmp_path: Path) -> None:
    def many(count: int) -> Iterator[Region]:
        for i in range(count):
            yield Region(1, shapely.box(3 * i, 0, 3 * i + 2, 2), False)

    def peak(count: int) -> int:
        tracemalloc.start()
        written(tmp_path, many(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(5_000) < 1.3 * peak(2_000)
    assert len(features_of(tmp_path)) == 2_000


@pytest.mark.parametrize(
    ("classes", "l0_per_out", "message"),
    [
        ((TissueClass("a", (0, 0, 0)), TissueClass("a", (1, 1, 1))), 1.0, "distinct"),
        ((TissueClass("a", (0, 0, 0)),), 0.0, "l0_per_out"),
        ((TissueClass("a", (0, 0, 0)),), float("nan"), "l0_per_out"),
    ],
)
def test_equal_class_names_and_impossible_scales_are_refused(
    tmp_path: Path, classes: Any, l0_per_out: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_features(tmp_path / "s.geojson", tmp_path / "s.parquet", [], classes, l0_per_out, HUGE, 0.5, "abc")
    assert list(tmp_path.iterdir()) == []


def test_label_without_a_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label 4, but the classes are 1 to 3"):
        written(tmp_path, [Region(4, HOLED, False)])


SQUARE = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]


def good() -> dict[str, Any]:
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "id": "12345678-1234-5678-1234-567812345678",
                "geometry": {"type": "Polygon", "coordinates": [copy.deepcopy(SQUARE)]},
                "properties": {
                    "objectType": "annotation",
                    "name": "a",
                    "isLocked": True,
                    "classification": {"name": "Tumor", "color": [1, 2, 3]},
                    "measurements": {"Area mm^2": 1.0},
                },
            }
        ],
    }


def test_the_checker_accepts_a_valid_file() -> None:
    assert len(checked_features(json.dumps(good()))) == 1


def _first(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda document: change(document["features"][0])


def _properties(**values: object) -> Callable[[dict[str, Any]], object]:
    return _first(lambda feature: feature["properties"].update(values))


def _rings(*rings: object) -> Callable[[dict[str, Any]], object]:
    return _first(lambda feature: feature["geometry"].update(coordinates=list(rings)))


BAD: dict[str, Callable[[dict[str, Any]], object]] = {
    "no color": _properties(classification={"name": "Tumor"}),
    "color as hex": _properties(classification={"name": "Tumor", "color": "#ff0000"}),
    "color as number": _properties(classification={"name": "Tumor", "color": -377282}),
    "color above 255": _properties(classification={"name": "Tumor", "color": [0, 0, 256]}),
    "color of floats": _properties(classification={"name": "Tumor", "color": [0.0, 0.5, 1.0]}),
    "empty class name": _properties(classification={"name": "", "color": [0, 0, 0]}),
    "derived class name": _properties(classification={"name": "a: b", "color": [0, 0, 0]}),
    "null class": _properties(classification=None),
    "null name": _properties(name=None),
    "null objectType": _properties(objectType=None),
    "upper-case objectType": _properties(objectType="ANNOTATION"),
    "unlocked": _properties(isLocked=False),
    "unknown property": _properties(score=1),
    "measurement as text": _properties(measurements={"a": "1.0"}),
    "measurement as boolean": _properties(measurements={"a": True}),
    "measurement null": _properties(measurements={"a": None}),
    "measurement NaN": _properties(measurements={"a": float("nan")}),
    "measurement infinite": _properties(measurements={"a": float("inf")}),
    "null properties": _first(lambda feature: feature.update(properties=None)),
    "null geometry": _first(lambda feature: feature.update(geometry=None)),
    "null id": _first(lambda feature: feature.update(id=None)),
    "id no UUID": _first(lambda feature: feature.update(id="7")),
    "no id": _first(lambda feature: feature.pop("id")),
    "bbox": _first(lambda feature: feature.update(bbox=[0, 0, 4, 4])),
    "other type": _first(lambda feature: feature.update(type="feature")),
    "multipolygon": _first(
        lambda feature: feature.update(geometry={"type": "MultiPolygon", "coordinates": [[SQUARE]]})
    ),
    "collection": _first(lambda feature: feature.update(geometry={"type": "GeometryCollection", "geometries": []})),
    "no rings": _rings(),
    "unclosed ring": _rings(SQUARE[:-1]),
    "short ring": _rings([[0, 0], [1, 1], [0, 0]]),
    "clockwise shell": _rings(SQUARE[::-1]),
    "counterclockwise hole": _rings(SQUARE, [[1, 1], [2, 1], [2, 2], [1, 2], [1, 1]]),
    "bow-tie": _rings([[0, 0], [4, 0], [0, 4], [8, 8], [0, 0]]),
    "crossing": _rings([[0, 0], [4, 4], [4, 0], [0, 9], [0, 0]]),
    "hole outside": _rings(SQUARE, [[10, 10], [10, 12], [12, 12], [12, 10], [10, 10]]),
    "repeated position": _rings([[0, 0], [0, 0], [4, 0], [4, 4], [0, 0]]),
    "off the grid": _rings([[0.001, 0], [4, 0], [4, 4], [0, 4], [0.001, 0]]),
    "three numbers": _rings([[*xy, 0] for xy in SQUARE]),
    "coordinate as text": _rings([["0", 0], *SQUARE[1:-1], ["0", 0]]),
    "coordinate NaN": _rings([[float("nan"), 0], *SQUARE[1:]]),
    "same id twice": lambda document: document["features"].append(copy.deepcopy(document["features"][0])),
    "crs": lambda document: document.update(crs={"type": "name"}),
    "no collection": lambda document: document.update(type="GeometryCollection"),
    "no features": lambda document: document.pop("features"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_the_checker_refuses(change: Callable[[dict[str, Any]], object]) -> None:
    document = good()
    change(document)
    assert broken_geojson_rules(json.dumps(document))[1]


def test_the_checker_refuses_two_colors_of_one_class() -> None:
    document = good()
    other = copy.deepcopy(document["features"][0])
    other["id"] = "22345678-1234-5678-1234-567812345678"
    other["properties"]["classification"]["color"] = [9, 9, 9]
    document["features"].append(other)
    assert broken_geojson_rules(json.dumps(document)) == (2, ["feature 1: two colors for class Tumor"])


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"type":"Feature"}\n{"type":"Feature"}', '{"type":"FeatureCollection","features":[],"features":[]}'],
)
def test_the_checker_refuses_other_texts(text: str) -> None:
    assert broken_geojson_rules(text)[1]
