"""QuPath's annotations: which count, which do not, and the labels of patches that they stand for."""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import LabelingError
from pipeline.labeling.annotations import Annotation, read_annotations
from pipeline.labeling.events import Labeled, SlideAdded
from pipeline.labeling.folder import Wishes
from pipeline.labeling.import_annotations import (
    COMPLETE,
    PRESENT,
    Drawing,
    Imported,
    ImportSource,
    annotation_files,
    annotation_sources,
    import_events,
    joined_sources,
    labels_from,
    share,
    slide_of,
    target_name,
)
from pipeline.labeling.importer import ImportFolder, import_drawings, open_import
from pipeline.labeling.labels import Labels, label_of
from pipeline.labeling.masks import UNKNOWN, Cutter, checked_area, joined, mask_HW
from pipeline.labeling.patches import SlidePatches
from pipeline.labeling.slides import SlideFile
from tests.pipeline.labeling.desks import SIDE
from tests.pipeline.labeling.events import SLIDE, fold
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


def test_a_second_import_adds_nothing_and_a_label_of_a_person_is_kept(slides: list[Path]) -> None:
    with open_slide(slides[0]) as slide:
        patches = SlidePatches(slide, "ab", 1.0, SIDE)
        box = Annotation(("tumor",), shapely.box(0, 0, 2.5 * SIDE, SIDE))
        found, _ = labels_from(patches, Drawing("ann", [box]), {}, {"tumor": 1, "other": 2})
    events, kept = import_events(fold(), "ann", SLIDE, found, partial=False)
    assert (len(events), kept) == (2, 0), "the third patch is covered in part"
    events, _ = import_events(fold(), "ann", SLIDE, found, partial=True)
    assert len(events) == 3
    imported = fold(*(("ann", event) for event in events))
    assert import_events(imported, "ann", SLIDE, found, partial=True) == ([], 0)
    own = found[0].model_copy(update={"source": "person", "answers": {1: "absent", 2: "present"}})
    corrected = fold(*(("ann", event) for event in [*events, own]))
    assert import_events(corrected, "ann", SLIDE, found, partial=True) == ([], 1)
    moved = SlideAdded(digest="ab", stamp="t", name="b.svs", patient="b")
    assert import_events(imported, "ann", moved, found, partial=True) == ([moved], 0)


def test_all_drawings_of_an_annotator_become_one_label_of_a_patch_however_often_they_are_imported(
    tmp_path: Path, slides: list[Path]
) -> None:
    left, right = shapely.box(0, 0, 1.5 * SIDE, SIDE), shapely.box(1.5 * SIDE, 0, 3 * SIDE, SIDE)
    drawings = [
        Drawing("ann", [Annotation(("tumor",), left)], "viewer", "correction", "m1"),
        Drawing("ann", [Annotation(("other",), right)], "qupath", "correction", "m2"),
        Drawing("bob", [Annotation(("tumor",), right)], "qupath", "correction", "m2"),
    ]
    with open_import(tmp_path / "l", "ann", Wishes(1.0, SIDE), ["tumor", "other"]) as folder:
        for _ in range(3):
            done = import_drawings(folder, SlideFile(slides[0], "a"), drawings, {}, partial=True)
            assert (done.complete, done.partial) == (3 + 1, 1)
            assert len(folder.store.read()) == 3 + 1 + 3 + 2, "settings, classes, the slide, and labels"
        events = [one.event for one in folder.store.read() if one.annotator == "ann"]
    made = {one.place.x_l0: one for one in events if isinstance(one, Labeled)}
    assert {x: one.answers for x, one in made.items()} == {
        0: {1: "present", 2: "absent"}, SIDE: {1: "present", 2: "present"}, 2 * SIDE: {1: "absent", 2: "present"}
    }  # fmt: skip
    assert {(one.source, one.reason, one.model) for one in made.values()} == {("viewer", "correction", None)}


def columns(left: int, right: int, file: str, name: str = "tumor", who: str = "ann") -> Drawing:
    """Return a drawing that covers these columns of the first row of patches."""
    box = shapely.box(left * SIDE, 0, right * SIDE, SIDE)
    return Drawing(who, [Annotation((name,), box)] if left < right else [], files=(file,))


def tumors(folder: ImportFolder) -> list[int]:
    """Return the columns of the patches in which ann's labels show a tumor."""
    labels = Labels(folder.store.read())
    found = {int(p.x_l0) // SIDE: labels.label(p, "ann") for p in labels.places()}
    return sorted(x for x, one in found.items() if one is not None and one.answers[1] == "present")


@contextmanager
def importing(path: Path, slide: Path) -> Iterator[tuple[ImportFolder, Callable[..., Imported]]]:
    """Open a labels folder, and give a function that imports drawings together."""
    with open_import(path, "ann", Wishes(1.0, SIDE), ["tumor", "other"]) as folder:

        def import_(*drawings: Drawing, partial: bool = False) -> Imported:
            return import_drawings(folder, SlideFile(slide, "a"), drawings, {}, partial=partial)

        yield folder, import_


def test_labels_that_the_same_file_no_longer_shows_are_taken_back(tmp_path: Path, slides: list[Path]) -> None:
    with importing(tmp_path / "l", slides[0]) as (folder, import_):
        assert import_(columns(0, 4, "x/a"), columns(0, 4, "x/a", who="bob")).taken_back == 0
        labels = Labels(folder.store.read())
        own = next(one for one in map(label_of, labels.labels_of("ann")) if one.place.x_l0 == 3 * SIDE)
        folder.store.append("ann", [own.model_copy(update={"source": "person", "view": "single", "files": ()})])
        assert import_(columns(6, 8, "x/b")).taken_back == 0, "another file"
        assert tumors(folder) == [0, 1, 2, 3, 6, 7]
        assert import_(columns(0, 2, "x/a")).taken_back == 1
        assert tumors(folder) == [0, 1, 3, 6, 7], "the label of the page stays"
        assert import_(columns(0, 2, "x/a")).taken_back == 0
        assert import_(columns(0, 0, "x/a"), columns(6, 7, "x/b")).taken_back == 3
        assert tumors(folder) == [3, 6]
        assert len(Labels(folder.store.read()).labels_of("bob")) == 4, "another person"


def test_a_label_that_was_replaced_by_one_of_another_file_comes_back_with_it(
    tmp_path: Path, slides: list[Path]
) -> None:
    with importing(tmp_path / "l", slides[0]) as (folder, import_):
        import_(columns(0, 2, "x/a"))
        import_(columns(1, 3, "x/b", "other"))
        assert tumors(folder) == [0]
        assert import_(columns(0, 0, "x/b")).taken_back == 2
        assert tumors(folder) == [0, 1]
        import_(columns(0, 2, "x/a"), columns(2, 3, "x/b"))
        assert import_(columns(0, 0, "x/a")).taken_back == 0
        assert tumors(folder) == [0, 1, 2], "made by both files together"


def test_labels_of_earlier_versions_are_replaced_by_an_import_and_removed_with_it(
    tmp_path: Path, slides: list[Path]
) -> None:
    for reason in ("import", "correction"):
        with importing(tmp_path / reason, slides[0]) as (folder, import_):
            legacy = replace(columns(0, 5, ""), files=(), reason=reason)
            import_(legacy, replace(legacy, annotator="bob"))
            own = next(one for one in Labels(folder.store.read()).labels_of("ann"))
            page = label_of(own).model_copy(update={"source": "person", "view": "single"})
            folder.store.append("ann", [page])
            assert import_(columns(0, 4, "x/a")).taken_back == 0
            assert tumors(folder) == [0, 1, 2, 3, 4]
            done = import_(columns(0, 2, "x/a"))
            left = [0, 1, 4] if reason == "import" else [0, 1, 2, 3, 4]
            assert (done.taken_back, tumors(folder)) == (5 - len(left), left), "a correction is not of this file"
            assert import_(columns(0, 0, "x/a")).taken_back == (1 if reason == "import" else 0)
            assert label_of(Labels(folder.store.read()).labels_of("ann")[-1]) == page
            assert len(Labels(folder.store.read()).labels_of("bob")) == 5


def test_a_changed_annotation_leaves_no_label_behind(tmp_path: Path, slides: list[Path]) -> None:
    with importing(tmp_path / "l", slides[0]) as (folder, import_):
        import_(columns(0, 2, "x/a"))
        import_(columns(0, 2, "x/a", "other"))
        assert len(Labels(folder.store.read()).labels_of("ann")) == 2
        # Earlier versions left the replaced label below the new one.
        top = label_of(Labels(folder.store.read()).labels_of("ann")[0])
        folder.store.append("ann", [top.model_copy(update={"files": ()}), top])
        assert import_(columns(0, 2, "x/a", "other")).taken_back == 0
        assert len(Labels(folder.store.read()).labels_of("ann")) == 2


def test_a_label_is_taken_back_if_its_file_now_covers_the_patch_in_part(tmp_path: Path, slides: list[Path]) -> None:
    half = Drawing("ann", [Annotation(("tumor",), shapely.box(0, 0, SIDE / 2, SIDE))], files=("x/a",))
    for partial, left in ((False, []), (True, [{1: "present", 2: "unknown"}])):
        with importing(tmp_path / str(partial), slides[0]) as (folder, import_):
            import_(columns(0, 1, "x/a"))
            for taken in (1, 0):
                assert import_(half, partial=partial).taken_back == taken
                assert [label_of(one).answers for one in Labels(folder.store.read()).labels_of("ann")] == left


def test_an_incomplete_label_does_not_replace_a_complete_one_of_another_file(
    tmp_path: Path, slides: list[Path]
) -> None:
    edge = Drawing("ann", [Annotation(("other",), shapely.box(0, 0, SIDE / 4, SIDE))], files=("x/b",))
    with importing(tmp_path / "l", slides[0]) as (folder, import_):
        import_(columns(0, 1, "x/a"))
        import_(edge, partial=True)
        (own,) = Labels(folder.store.read()).labels_of("ann")
        assert label_of(own).answers == {1: "present", 2: "absent"}
        import_(columns(0, 0, "x/a"))
        import_(edge, partial=True)
        (own,) = Labels(folder.store.read()).labels_of("ann")
        assert label_of(own).answers == {1: "unknown", 2: "present"}


def test_a_file_is_stated_with_its_folder(tmp_path: Path) -> None:
    (source,) = annotation_sources([written(tmp_path / "a.geojson", feature())], tmp_path / "a.svs", "ann", None)
    assert [one.files for one in source.drawings] == [(f"{tmp_path.name}/a.geojson",)]


def test_sources_of_one_slide_are_imported_together() -> None:
    one, other, third = (Drawing("ann", [Annotation(("a",), shapely.box(0, 0, x, 1))]) for x in (1, 2, 3))
    a, b = Path("a.svs"), Path("b.svs")
    first, second = joined_sources([
        ImportSource("a.geojson", a, [one], {"locked": 1}, classes=["x", "y"]),
        ImportSource("b.geojson", b, [other], {}),
        ImportSource("a.svs.geojson", a, [third], {"locked": 2}, classes=["y", "z"]),
    ])  # fmt: skip
    joined = ImportSource("a.geojson, a.svs.geojson", a, [one, third], {"locked": 3}, classes=("x", "y", "z"))
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
