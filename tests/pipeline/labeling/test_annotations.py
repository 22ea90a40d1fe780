"""QuPath's annotations: which count, which do not, and the labels of patches that they stand for."""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from models.tissue_class import TissueClass
from pipeline.errors import LabelingError
from pipeline.labeling.annotations import Annotation, read_annotations
from pipeline.labeling.import_annotations import (
    COMPLETE,
    PRESENT,
    Drawing,
    ImportSource,
    annotation_files,
    annotation_sources,
    count_outside,
    joined_sources,
    labels_from,
    share,
    slide_of,
    target_name,
)
from pipeline.labeling.importer import known_classes
from pipeline.labeling.masks import UNKNOWN, Cutter, checked_area, joined, mask_HW
from pipeline.labeling.patches import SlidePatches
from tests.pipeline.labeling.desks import SIDE
from wsi.slide import open_slide

BOX = [[0, 0], [100, 0], [100, 50], [0, 50], [0, 0]]


def feature(classification: Any = "Tumor", geometry: Any = None, **properties: Any) -> dict[str, Any]:
    """Return an object as QuPath writes it. A text stands for a class of this name."""
    if isinstance(classification, str):
        classification = {"name": classification, "color": [200, 0, 0]}
    known = {"objectType": "annotation", "classification": classification, **properties}
    return {
        "type": "Feature",
        "id": "x",
        "geometry": geometry or {"type": "Polygon", "coordinates": [BOX]},
        "properties": {name: value for name, value in known.items() if value is not None},
    }


def written(file: Path, *features: Any) -> Path:
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("classification", "name"),
    [
        ("Tumor", ("Tumor",)),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, ("Tumor", "Positive")),
        ({"name": "Tumor: Positive", "colorRGB": -3670016}, ("Tumor", "Positive")),
        ({"name": "Ignore*"}, ("Ignore*",)),
    ],
)
def test_classes_are_read_in_all_their_forms(tmp_path: Path, classification: Any, name: tuple[str, ...]) -> None:
    (one,) = read_annotations(written(tmp_path / "a.geojson", feature(classification))).found
    assert one.name == name
    assert one.is_ignored == name[-1].endswith("*")
    assert one.shape.equals(shapely.box(0, 0, 100, 50))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"objectType": "detection"}, "not annotations"),
        ({"objectType": "tile"}, "not annotations"),
        ({"isLocked": True}, "locked; unlock them in QuPath if they are labels"),
        ({"isLocked": True, "measurements": {"Area mm^2": 0.1}}, "regions of wsi-segment, which are predictions"),
        ({"measurements": [{"name": "Area mm^2", "value": 1}]}, "regions of wsi-segment, which are predictions"),
        ({"classification": None}, "without a class"),
        ({"classification": {"name": "Region*"}}, "of class Region*"),
        ({"geometry": {"type": "LineString", "coordinates": [[0, 0], [9, 9]]}}, "without an area"),
        ({"geometry": {"type": "Point", "coordinates": [4, 4]}}, "without an area"),
        ({"geometry": {"type": "Polygon", "coordinates": [BOX], "plane": {"c": -1, "z": 2, "t": 0}}},
         "on another plane than the first"),
    ],
)  # fmt: skip
def test_objects_that_are_not_labels_are_skipped_with_a_reason(
    tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    geometry = changed.pop("geometry", None)
    one = feature(geometry=geometry)
    one["properties"] |= changed
    read = read_annotations(written(tmp_path / "a.geojson", one, feature()))
    assert (len(read.found), read.skipped) == (1, {reason: 1})


def test_ellipses_collections_and_crossing_polygons_have_the_area_that_qupath_gives_them(tmp_path: Path) -> None:
    ellipse = {"type": "Polygon", "coordinates": [BOX], "isEllipse": True}
    collection = {
        "type": "GeometryCollection",
        "geometries": [
            {"type": "Polygon", "coordinates": [BOX]},
            {"type": "MultiPolygon", "coordinates": [[[[200, 0], [210, 0], [210, 10], [200, 10], [200, 0]]]]},
            {"type": "Point", "coordinates": [500, 500]},
        ],
    }
    crossing = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}
    plane = {"type": "Polygon", "coordinates": [BOX], "plane": {"c": -1, "z": 0, "t": 0}}
    shapes = [feature(geometry=g) for g in (ellipse, collection, crossing, plane)]
    areas = [one.shape.area for one in read_annotations(written(tmp_path / "a.geojson", *shapes)).found]
    assert areas == pytest.approx([math.pi * 50 * 25, 5100, 50, 5000], rel=1e-3)


def test_every_file_that_qupath_writes_is_read(tmp_path: Path) -> None:
    text = written(tmp_path / "a.geojson", feature()).read_text(encoding="utf-8")
    (tmp_path / "list.geojson").write_text(json.dumps([feature()]), encoding="utf-8")
    (tmp_path / "one.geojson").write_text(json.dumps(feature()), encoding="utf-8")
    double = text.replace('"objectType"', '"metadata": {"a": "1"}, "metadata": {"b": "2"}, "objectType"')
    (tmp_path / "double.json").write_text(double, encoding="utf-8")
    with gzip.open(tmp_path / "b.geojson.gz", "wt") as stream:
        stream.write(text)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("c.geojson", text)
    files = annotation_files([tmp_path])
    assert len(files) == 6
    assert all(len(read_annotations(file).found) == 1 for file in files)


def test_files_that_a_mac_adds_to_folders_and_archives_are_skipped(tmp_path: Path) -> None:
    text = written(tmp_path / "a.geojson", feature()).read_text(encoding="utf-8")
    (tmp_path / "._a.geojson").write_bytes(b"\x00\x05\x16\x07")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in ("drawn/b.geojson", "drawn/c.geojson"):
            archive.writestr(name, text)
        for name in ("__MACOSX/drawn/b", "__MACOSX/drawn/._b.geojson", "drawn/._c.geojson", "drawn/.DS_Store"):
            archive.writestr(name, b"\x00\x05\x16\x07")
    assert annotation_files([tmp_path]) == [tmp_path / "a.geojson", tmp_path / "b.zip"]
    assert len(read_annotations(tmp_path / "b.zip").found) == 2
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "._a.geojson").touch()
    with pytest.raises(LabelingError, match="only: contains no annotations"):
        annotation_files([tmp_path / "only"])


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"{}", b'"text"', b'{"type": "FeatureCollection"}', b"[1]", b"[" * 100_000,
     b'[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1]]]}, "properties": {"classification": "a"}}]',
     b'[{"geometry": null, "properties": {"classification": "a"}}]'],
)  # fmt: skip
@pytest.mark.parametrize("ending", [".geojson", ".geojson.gz", ".zip"])
def test_a_file_that_is_not_geojson_is_refused_by_name(tmp_path: Path, content: bytes, ending: str) -> None:
    file = tmp_path / f"bad{ending}"
    file.write_bytes(content)
    with pytest.raises(LabelingError, match=r"bad\."):
        read_annotations(file)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (("Tumor",), "tumor"), (("Tumor", "Positive"), "tumor"), (("Stroma",), "Stroma"),
        (("Stroma", "Dense"), "dense"), (("Ignore*",), None), (("Necrosis", "Ignore*"), None), (("Glass*",), "other"),
    ],
)  # fmt: skip
def test_classes_are_mapped_by_their_whole_name_then_their_first_part(name: tuple[str, ...], target: str) -> None:
    mapping = {"Tumor": "tumor", "Stroma: Dense": "dense", "Glass*": "other"}
    assert target_name(Annotation(name, shapely.box(0, 0, 1, 1)), mapping) == target


CORNER = st.integers(0, 900)


@given(
    st.lists(st.tuples(st.sampled_from((1, 2)), CORNER, CORNER, st.integers(1, 500), st.integers(1, 500)), max_size=6)
)
def test_presence_is_that_of_counted_pixels(slides: list[Path], boxes: list[tuple[int, int, int, int, int]]) -> None:
    # Slow and simple: paint each class on a canvas and count.
    canvas = np.zeros((3, 1600, 1600), bool)
    for id_, x, y, width, height in boxes:
        canvas[id_, y : y + height, x : x + width] = True
    annotations = [Annotation((str(i),), shapely.box(x, y, x + w, y + h)) for i, x, y, w, h in boxes]
    with open_slide(slides[0]) as slide:
        patches = SlidePatches(slide, "ab", 1.0, SIDE)
        found, ignored = labels_from(patches, Drawing("ann", annotations), {}, {"1": 1, "2": 2})
    expected = {}
    for y in range(0, 832, SIDE):
        for x in range(0, 1280, SIDE):
            cell = canvas[:, y : y + SIDE, x : x + SIDE]
            present = {i for i in (1, 2) if cell[i].mean() >= PRESENT}
            rest = "absent" if (cell[1] | cell[2]).mean() >= COMPLETE else "unknown"
            if present:
                expected[(x, y)] = {i: "present" if i in present else rest for i in (1, 2)}
    assert {(int(one.place.x_l0), int(one.place.y_l0)): one.answers for one in found} == expected
    for one in found:
        cell = canvas[:, int(one.place.y_l0) :, int(one.place.x_l0) :][:, :SIDE, :SIDE]
        assert (one.areas is None) == ((cell[1] | cell[2]).mean() < COMPLETE)
        if one.areas is None:
            continue
        only = np.where(cell[1] == cell[2], 255, np.where(cell[1], 0, 1))
        np.testing.assert_array_equal(mask_HW(tuple(one.areas.get(i, "") for i in (1, 2)), SIDE), only)
    assert ignored == 0
    assert all((one.source, one.view, one.reason, one.seconds) == ("qupath", "import", "import", None) for one in found)


def test_patches_with_an_ignored_class_get_no_label(slides: list[Path]) -> None:
    annotations = [
        Annotation(("tumor",), shapely.box(0, 0, 2 * SIDE, SIDE)), Annotation(("Ignore*",), shapely.box(0, 0, 9, SIDE))
    ]  # fmt: skip
    with open_slide(slides[0]) as slide:
        patches = SlidePatches(slide, "ab", 1.0, SIDE)
        found, ignored = labels_from(patches, Drawing("ann", annotations), {}, {"tumor": 1, "other": 2})
    assert [(one.place.x_l0, one.answers) for one in found] == [(float(SIDE), {1: "present", 2: "absent"})]
    assert ignored == 1


def test_annotations_without_a_pixel_of_the_slide_are_outside() -> None:
    boxes = [(-9, -9, 1, 1), (99, 0, 200, 9), (100, 0, 200, 9), (0, 50, 9, 60), (-9, -9, -1, -1), (0, 0, 900, 900)]
    annotations = [Annotation(("tumor",), shapely.box(*box)) for box in boxes]
    assert [count_outside([one], (100, 50)) for one in annotations] == [0, 0, 1, 1, 1, 0]
    assert (count_outside(annotations, (100, 50)), count_outside([], (100, 50))) == (3, 0)


def test_a_file_is_stated_with_its_folder(tmp_path: Path) -> None:
    (source,) = annotation_sources([written(tmp_path / "a.geojson", feature())], tmp_path / "a.svs", "ann", None)
    assert [one.files for one in source.drawings] == [(f"{tmp_path.name}/a.geojson",)]


def test_sources_of_one_slide_are_imported_together() -> None:
    one, other, third = (Drawing("ann", [Annotation(("a",), shapely.box(0, 0, w, 1))]) for w in (1, 2, 3))
    a, b = Path("a.svs"), Path("b.svs")
    x, y, z = (TissueClass(name, (1, 2, 3)) for name in "xyz")
    first, second = joined_sources([
        ImportSource("a.geojson", a, [one], {"locked": 1}, classes=[x, y]),
        ImportSource("b.geojson", b, [other], {}),
        ImportSource("a.svs.geojson", a, [third], {"locked": 2}, classes=[y, z]),
    ])  # fmt: skip
    joined = ImportSource("a.geojson, a.svs.geojson", a, [one, third], {"locked": 3}, classes=(x, y, z))
    assert (first, second) == (joined, ImportSource("b.geojson", b, [other], {}))
    assert len(joined_sources([ImportSource("a", a, [one], {}, digest=digest) for digest in "cd"])) == 2
    assert len(joined_sources([ImportSource("a", path, [one], {}, digest="c") for path in (a, b)])) == 1


def test_a_file_belongs_to_the_slide_of_its_name(tmp_path: Path) -> None:
    for name in ("a.svs", "b.svs", "b.tiff"):
        (tmp_path / name).touch()
    for name in ("a.svs.geojson", "a.geojson", "A.ZIP".lower(), "a.geojson.gz"):
        assert slide_of(Path(name), tmp_path) == tmp_path / "a.svs"
    assert slide_of(Path("x.geojson"), tmp_path / "a.svs") == tmp_path / "a.svs"
    assert slide_of(Path("b.tiff.geojson"), tmp_path) == tmp_path / "b.tiff"
    for name, count in (("b.geojson", 2), ("c.geojson", 0)):
        with pytest.raises(LabelingError, match=f"{name}: {count} slides"):
            slide_of(Path(name), tmp_path)
    with pytest.raises(LabelingError, match="contains no annotations"):
        annotation_files([tmp_path])


def test_a_file_belongs_to_a_slide_whose_name_has_its_umlaut_in_two_characters(tmp_path: Path) -> None:
    (tmp_path / "Ko\u0308ln.svs").touch()
    (tmp_path / "Jena.svs").touch()
    assert slide_of(Path("K\u00f6ln.geojson"), tmp_path).stat() == (tmp_path / "Ko\u0308ln.svs").stat()


def test_annotations_may_lie_beside_their_slide(tmp_path: Path) -> None:
    for name in ("a.svs", "a.geojson", "a.svs.geojson", "a.GEOJSON.gz", "a.zip"):
        (tmp_path / name).touch()
    for name in ("a.geojson", "a.svs.geojson", "a.GEOJSON.gz", "a.zip"):
        assert slide_of(tmp_path / name, tmp_path) == tmp_path / "a.svs"
    (tmp_path / "b.geojson").touch()
    with pytest.raises(LabelingError, match=r"b\.geojson: 0 slides"):
        slide_of(tmp_path / "b.geojson", tmp_path)


def test_slivers_that_collapse_on_the_grid_are_an_empty_area() -> None:
    tips = [shapely.Polygon([(255.99, y), (300, y - 1), (300, y + 1)]) for y in (100, 150)]
    text = Cutter(shapely.union_all(tips)).cut(0, 0, 256, SIDE)
    assert checked_area(text) == "MULTIPOLYGON EMPTY"
    assert joined([text, text]) == "MULTIPOLYGON EMPTY"
    assert shapely.from_wkt(joined([text, "POLYGON ((0 0, 9 0, 9 9, 0 9, 0 0))"])).area == 81
    assert (mask_HW((text, ""), SIDE) == UNKNOWN).all()


def test_the_share_of_nothing_is_zero() -> None:
    assert share([], shapely.box(0, 0, 1, 1)).shape == (0,)
    assert share([shapely.box(0, 0, 2, 2)], shapely.union_all([])).tolist() == [0]


def test_a_mapped_class_keeps_its_color_and_role_unless_several_get_one_name() -> None:
    glass = TissueClass("glass", (1, 1, 1), "background")
    fat, other = TissueClass("fat", (2, 2, 2)), TissueClass("other", (3, 3, 3))
    classes = [glass, fat, other, glass]
    assert known_classes(classes, {"glass": "empty"}) == {"empty": glass, "fat": fat, "other": other}
    assert known_classes(classes, {"glass": "other", "fat": "other"}) == {"other": other}
    assert known_classes(classes, {"glass": "no", "fat": "no"}) == {"other": other}
    assert known_classes(classes, {"glass": "fat", "fat": "x"}) == {"fat": glass, "x": fat, "other": other}
