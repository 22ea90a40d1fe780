"""Labels of annotations that are imported again, after they were changed or beside those of other files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import shapely

from pipeline.labeling.annotations import Annotation
from pipeline.labeling.events import Labeled, SlideAdded
from pipeline.labeling.folder import Wishes
from pipeline.labeling.import_annotations import (
    Drawing,
    Imported,
    import_events,
    labels_from,
)
from pipeline.labeling.importer import ImportFolder, import_drawings, open_import
from pipeline.labeling.labels import Labels, label_of
from pipeline.labeling.patches import SlidePatches
from pipeline.labeling.slides import SlideFile
from tests.pipeline.labeling.desks import SIDE
from tests.pipeline.labeling.events import SLIDE, fold
from wsi.slide import open_slide


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
    with open_import(tmp_path / "l", "ann", Wishes(1.0, SIDE), ["tumor", "other"], {}) as folder:
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
    with open_import(path, "ann", Wishes(1.0, SIDE), ["tumor", "other"], {}) as folder:

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
