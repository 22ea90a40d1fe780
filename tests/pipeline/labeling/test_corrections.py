"""Corrections of a result: which count, who made them, and what a map that nobody changed stands for."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from models.tissue_class import TissueClass
from pipeline.errors import LabelingError
from pipeline.formats.features import Feature, geojson_feature, read_features, write_features
from pipeline.formats.polygons import Region
from pipeline.labeling.annotations import read_annotations
from pipeline.labeling.corrections import (
    CORRECTION_EVENTS,
    CorrectionEvent,
    Relabeled,
    alive,
    correction_features,
    corrections_file,
    current,
    latest_own,
    read_corrections,
    relabeled,
    sent_file,
)
from pipeline.labeling.event_file import Entry, EventFile
from pipeline.labeling.events import Undone
from pipeline.labeling.import_corrections import corrected_sources
from pipeline.labeling.published_map import PublishedMap
from pipeline.labeling.store import EventStore

TUMOR, STROMA = TissueClass("tumor", (200, 0, 0)), TissueClass("stroma", (0, 0, 200))
ID = "6d0f5a3e-7c3b-5f0e-9a57-0d9e6f1c2b3a"
OTHER_ID = "0b7c1d52-93f4-5a86-b1de-52c7a4f0e913"


def region(id_: str = ID, box: shapely.Geometry | None = None, one: TissueClass = TUMOR) -> Feature:
    polygon = box or shapely.box(0, 0, 100, 50)
    assert isinstance(polygon, shapely.Polygon)
    return Feature(id_, 1, one, 0.005, polygon)


MAP = PublishedMap([region(), region(OTHER_ID, shapely.box(100, 0, 200, 50), STROMA)])


def events(*pairs: tuple[str, CorrectionEvent]) -> list[Entry[CorrectionEvent]]:
    return [Entry(n, f"2026-01-01T00:00:0{n}", who, event) for n, (who, event) in enumerate(pairs, start=1)]


def to(after: str, feature: Feature | None = None) -> Relabeled:
    return relabeled(feature or region(), "ab", "cd", after)


def test_the_latest_correction_of_a_region_counts_until_it_is_undone() -> None:
    entries = events(("ann", to("stroma")), ("bob", to("other")), ("ann", Undone(numbers=(2,))))
    assert [(one.annotator, one.event.after) for one in current(entries[:2])] == [("bob", "other")]
    assert [(one.annotator, one.event.after) for one in current(entries)] == [("ann", "stroma")]
    assert current(events(("ann", to("stroma")), ("ann", to("tumor")))) == [], "as in the map"
    assert [one.number for one in alive(entries)] == [1]


def test_a_person_undoes_only_their_own_corrections_that_are_shown() -> None:
    entries = events(("ann", to("stroma")), ("ann", to("tumor", region(OTHER_ID))), ("bob", to("other")))

    def number(author: str, shown: tuple[str, ...], entries: list[Entry[CorrectionEvent]] = entries) -> int | None:
        one = latest_own(entries, author, lambda event: event.region in shown)
        return None if one is None else one.number

    assert (number("ann", (ID, OTHER_ID)), number("ann", (ID,)), number("ann", ())) == (2, 1, None)
    assert number("eve", (ID,)) is None
    assert number("ann", (ID,), events(("ann", to("stroma")), ("ann", Undone(numbers=(1,))))) is None


def test_a_region_keeps_its_holes_through_the_file(tmp_path: Path) -> None:
    whole = shapely.box(0, 0, 100, 100).difference(shapely.box(10, 10, 20, 20))
    with EventFile(corrections_file(tmp_path / "a"), CORRECTION_EVENTS) as file:
        file.append("ann", [to("stroma", region(box=whole))])
    (read,) = read_corrections(tmp_path / "a")
    assert (read.annotator, read.event.before, read.event.after) == ("ann", "tumor", "stroma")
    assert read.event.polygon_l0.equals(whole)
    assert read_corrections(tmp_path / "b") == []
    assert not corrections_file(tmp_path / "b").exists()


def saved(result: Path, event: str, annotator: object = "ann") -> Path:
    """Write a file of corrections with one event, as another program could, and return it."""
    file = corrections_file(result)
    EventFile(file, CORRECTION_EVENTS).close()
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("INSERT INTO events (time, annotator, event) VALUES ('t', ?, ?)", (annotator, event))
    return file


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"region": "not-a-uuid"}, "region"),
        ({"rings_l0": []}, "rings_l0"),
        ({"rings_l0": [[[0, 0]]]}, "rings_l0"),
        ({"rings_l0": [[[0, 0, 0], [9, 0, 0], [9, 9, 0], [0, 0, 0]]]}, "rings_l0"),
        ({"rings_l0": [[[0, 0], [1e300, 0], [1e300, 1e300], [0, 0]]]}, "rings_l0"),
        ({"rings_l0": [[[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]]}, "not a valid area: Self-intersection"),
    ],
)
def test_a_damaged_correction_is_an_error_that_names_the_file(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    saved(tmp_path / "slide", json.dumps(to("stroma").model_dump(mode="json") | change))
    with pytest.raises(LabelingError, match=rf"(?s)slide\.corrections\.sqlite: is damaged.*{reason}"):
        read_corrections(tmp_path / "slide")


def test_an_annotator_that_is_not_text_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    saved(tmp_path / "slide", to("stroma").model_dump_json(), b"\xff\xfe")
    with pytest.raises(LabelingError, match=r"slide\.corrections\.sqlite: is damaged.*not text but bytes"):
        read_corrections(tmp_path / "slide")


def test_a_region_of_a_damaged_result_cannot_be_corrected() -> None:
    with pytest.raises(LabelingError, match=r"(?s)the region b cannot be corrected.*; segment the slide again"):
        to("stroma", region("b"))


def test_the_corrections_of_a_linked_result_are_found_beside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "store" / "a").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    link = tmp_path / "results" / "link"
    link.symlink_to(tmp_path / "store" / "a")
    assert corrections_file(link) == tmp_path / "store" / "a.corrections.sqlite"
    assert sent_file(link) == tmp_path / "store" / "a.corrections.geojson"


def test_a_file_of_labels_is_not_a_file_of_corrections(tmp_path: Path) -> None:
    EventStore(corrections_file(tmp_path / "a")).close()
    with pytest.raises(LabelingError, match="is not a file of corrections of version 1; move it away"):
        read_corrections(tmp_path / "a")


def test_exported_corrections_are_read_as_what_a_person_drew_and_as_changes_of_the_map(tmp_path: Path) -> None:
    (made,) = correction_features(current(events(("ann", to("stroma")))), [TUMOR, STROMA])
    assert made["properties"]["classification"] == {"name": "stroma", "color": [0, 0, 200]}
    assert made["properties"]["metadata"] == {
        "author": "ann", "time": "2026-01-01T00:00:01", "class before": "tumor"
    }  # fmt: skip
    assert made["id"] != ID
    for published in (None, MAP):
        (one,) = read(tmp_path, [made], published).found
        assert (one.name, one.shape.area) == (("stroma",), 5000)
    (gray,) = correction_features(current(events(("ann", to("gone")))), [TUMOR])
    assert gray["properties"]["classification"] == {"name": "gone", "color": [128, 128, 128]}


def read(folder: Path, features: list[dict[str, Any]], published: PublishedMap | None) -> Any:
    file = folder / "a.geojson"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return read_annotations(file, published)


def sent(id_: str, name: str, box: shapely.Geometry, *, locked: bool = True, ours: bool = True) -> dict[str, Any]:
    """Return a region as QuPath writes it."""
    made = geojson_feature(region(id_, box, TissueClass(name, (1, 2, 3))))
    if not locked:
        del made["properties"]["isLocked"]
    if not ours:
        del made["properties"]["measurements"]
    return made


@pytest.mark.parametrize(
    ("features", "areas", "skipped"),
    [
        ([sent(ID, "tumor", shapely.box(0, 0, 100, 50))], {}, {"without a change": 1}),
        # QuPath rounds coordinates.
        ([sent(ID, "tumor", shapely.box(0, 0, 100.01, 50))], {}, {"without a change": 1}),
        ([sent(ID, "stroma", shapely.box(0, 0, 100, 50))], {"stroma": 5000}, {}),
        ([sent(ID, "mucin", shapely.box(0, 0, 100, 50))], {"mucin": 5000}, {}),
        # Redrawn: only what is new.
        ([sent(ID, "tumor", shapely.box(0, 0, 120, 50), locked=False)], {"tumor": 1000}, {}),
        # Split, with one part of another class.
        (
            [sent("x", "tumor", shapely.box(0, 0, 40, 50), locked=False, ours=False),
             sent("y", "stroma", shapely.box(40, 0, 100, 50), locked=False, ours=False)],
            {"stroma": 3000},
            {"without a change": 1},
        ),
        # Drawn over both regions.
        ([sent("x", "tumor", shapely.box(50, 0, 150, 50), locked=False, ours=False)], {"tumor": 2500}, {}),
        ([sent("z", "stroma", shapely.box(0, 0, 100, 50))], {}, {"regions of wsi-segment, which are predictions": 1}),
        (
            [sent("z", "stroma", shapely.box(0, 0, 9, 9), ours=False)],
            {},
            {"locked; unlock them in QuPath if they are labels": 1},
        ),
    ],
)  # fmt: skip
def test_only_the_places_with_another_class_than_the_map_count(
    tmp_path: Path, features: list[dict[str, Any]], areas: dict[str, float], skipped: dict[str, int]
) -> None:
    found = read(tmp_path, features, MAP)
    assert {one.name[0]: one.shape.area for one in found.found} == areas
    assert found.skipped == skipped


# Even numbers, as the borders of the map, because parts that are 1 px wide do not count.
CORNER = st.integers(-25, 125).map(lambda half: 2 * half)
SIDE = st.integers(1, 100).map(lambda half: 2 * half)


@given(CORNER, CORNER, SIDE, SIDE, st.sampled_from(["tumor", "stroma", "mucin"]))
def test_a_change_is_what_is_left_after_cutting_out_the_class_itself(x: int, y: int, w: int, h: int, name: str) -> None:
    own = {"tumor": (0, 100), "stroma": (100, 200), "mucin": (0, 0)}[name]
    across = max(0, min(own[1], x + w) - max(own[0], x)) * max(0, min(50, y + h) - max(0, y))
    assert MAP.changed(name, shapely.box(x, y, x + w, y + h)).area == pytest.approx(w * h - across)


def test_stored_features_are_read_as_they_were_written(tmp_path: Path) -> None:
    regions = [Region(1, shapely.box(0, 0, 4, 4), False), Region(2, shapely.box(4, 0, 8, 4), False)]
    paths = tmp_path / "a.geojson", tmp_path / "a.parquet"
    write_features(*paths, regions, [TUMOR, STROMA], 4.0, (32, 16), 0.5, "ab")
    found = list(read_features(paths[1], [TUMOR, STROMA]))
    assert [(one.tissue_class, one.geometry_l0.bounds) for one in found] == [
        (TUMOR, (0, 0, 16, 16)), (STROMA, (16, 0, 32, 16))
    ]  # fmt: skip
    assert [one.id for one in found] == [one["id"] for one in json.loads(paths[0].read_text())["features"]]
    assert found[0].area_mm2 == pytest.approx(256 * 0.25e-6)
    with pytest.raises(OSError, match=r"a\.geojson: cannot be read"):
        list(read_features(paths[0], [TUMOR]))


def test_results_without_corrections_are_an_error_with_the_next_step(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(LabelingError, match="contains no corrections of a result; correct regions in wsi-view"):
            corrected_sources(path, None, "ann")
