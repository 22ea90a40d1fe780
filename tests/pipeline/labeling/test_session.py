"""What comes next, what is saved, and what a second session or a second person sees."""

from __future__ import annotations

import csv
import os
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import shapely

from models.bundle import Bundle
from pipeline.errors import LabelingError
from pipeline.labeling.annotations import Annotation
from pipeline.labeling.desk import open_desk
from pipeline.labeling.events import Labeled, SlideAdded
from pipeline.labeling.folder import Wishes, add_classes, merge_classes, remove_class
from pipeline.labeling.import_annotations import Drawing
from pipeline.labeling.importer import import_drawings, open_import
from pipeline.labeling.session import AHEAD, NewLabel, Patch, Session
from pipeline.labeling.slides import ReadySlide, SlideFile, Slides
from pipeline.labeling.store import EventStore
from tests.pipeline.labeling.desks import SIDE, answers, desk, label_slide, save
from tests.pipeline.labeling.events import STARTED
from wsi.errors import SlideFormatError
from wsi.slide import Slide, open_slide, slide_digest, slide_stamp


def ids(session: Session, count: int = 6) -> list[str]:
    return [patch.place.id for patch in session.upcoming(count)]


def test_the_order_alternates_between_slides_and_is_the_same_after_a_restart(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "one", slides, shipped) as one:
        first = one.session.upcoming(20)
        assert [one.slides.of(p.place).added.name for p in first] == ["a.svs", "b.svs"] * 10  # type: ignore[union-attr]
    with desk(tmp_path / "two", slides[::-1], shipped) as two:
        assert two.session.upcoming(20) == first
    with desk(tmp_path / "three", slides, shipped, wishes=Wishes(side=64, seed=8)) as three:
        assert three.session.upcoming(20) != first


def test_labels_survive_a_restart_and_labeled_patches_do_not_come_again(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        order = ids(at.session, 6)
        for patch in at.session.upcoming(4):
            save(at, patch, 1)
    with desk(tmp_path / "l", slides, shipped, classes=(), wishes=Wishes()) as at:
        assert ids(at.session, 2) == order[4:]
        assert [patch.place.id for patch in at.session.history()] == order[:4][::-1]
        counts = at.session.counts()
        assert (counts.labeled, counts.present) == (4, {1: 4, 2: 0})
        assert sorted(counts.by_slide.values()) == [2, 2]
        assert at.session.median_seconds() == 1.5
        assert [patch.place.id for patch in at.session.undo()] == order[3:4], "an undo reaches the session before"


def test_the_first_undo_after_a_restart_takes_back_the_whole_grid(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        first, *grid = at.session.upcoming(4)
        save(at, first, 1)
        at.session.save([NewLabel(one.place, answers(at, 2), "none", "grid", 1.0) for one in grid], {})
        last = at.session.last()
    with desk(tmp_path / "l", slides, shipped) as at:
        assert (len(last), at.session.last()) == (3, last)
        assert [one.place for one in at.session.undo()] == [one.place for one in grid]
        assert [one.place for one in at.session.undo()] == [first.place]


def test_undo_takes_back_one_label_or_a_whole_grid(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        one, *rest = at.session.upcoming(5)
        save(at, one, 2)
        at.session.save([NewLabel(p.place, answers(at, 1), "none", "grid", 0.2) for p in rest], {})
        assert at.session.counts().present == {1: 4, 2: 1}
        assert [patch.place for patch in at.session.undo()] == [patch.place for patch in rest]
        assert at.session.counts().present == {1: 0, 2: 1}
        assert [patch.place for patch in at.session.undo()] == [one.place]
        assert at.session.undo() == []
        assert at.session.counts().labeled == 0


def test_an_undo_that_cannot_be_saved_leaves_the_label_for_the_next_undo(
    tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> tuple[int, ...]:
        raise LabelingError("the disk is full")

    with desk(tmp_path / "l", slides, shipped) as at:
        first, second = at.session.upcoming(2)
        save(at, first, 1)
        save(at, second, 1)
        with monkeypatch.context() as patched:
            patched.setattr(EventStore, "append", full)
            with pytest.raises(LabelingError, match="the disk is full"):
                at.session.undo()
        assert [patch.place for patch in at.session.undo()] == [second.place]
        assert [patch.place for patch in at.session.undo()] == [first.place]


def test_undo_leaves_imported_labels(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        made, imported = at.session.upcoming(2)
        save(at, made, 1)
        save(at, imported, 1, view="import")
    with desk(tmp_path / "l", slides, shipped) as at:
        assert [patch.place for patch in at.session.undo()] == [made.place]
        assert at.session.undo() == []
        assert at.session.counts().labeled == 1


def test_a_label_that_is_corrected_counts_once(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        (patch,) = at.session.upcoming(1)
        save(at, patch, 1)
        (again,) = at.session.history()
        assert again.label is not None
        assert again.label.answers == {1: "present", 2: "absent"}
        save(at, again, 2)
        assert at.session.counts().present == {1: 0, 2: 1}
        at.session.save([NewLabel(patch.place, {}, "artifact", "single", 1.0)], {})
        assert (at.session.counts().labeled, at.session.counts().artifact) == (0, 1)


def test_two_people_share_the_blind_patches_and_divide_the_others(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as ann, desk(tmp_path / "l", slides, shipped, annotator="bob") as bob:
        done = ann.session.upcoming(12)
        for patch in done:
            save(ann, patch, 1)
        blind = [patch.place for patch in done if patch.blind]
        assert 0 < len(blind) < 12
        offered = bob.session.upcoming(40)
        assert [patch.place for patch in offered if patch.place in {p.place for p in done}] == blind
        assert all(patch.label is None for patch in offered), "the other person's labels are not shown"


def test_the_next_patch_waits_for_a_slide_only_if_the_open_ones_have_none_left(
    tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = {name: threading.Event() for name in ("a.svs", "b.svs", "c.svs")}
    opened = Slides._opened

    def gated(self: Slides, file: SlideFile) -> ReadySlide | None:
        gates[file.path.name].wait()
        return opened(self, file)

    monkeypatch.setattr(Slides, "_opened", gated)
    files = [SlideFile(path, path.stem) for path in (*slides, label_slide(tmp_path / "c.svs", seed=2))]
    wishes = Wishes(side=SIDE, blind_share=0.25)
    classes = ("class-0", "class-1")
    with (
        open_desk(tmp_path / "l", files, "ann", wishes=wishes, classes=classes, model=None, shipped=shipped) as at,
        ThreadPoolExecutor(1) as thread,
    ):

        def upcoming() -> Future[list[Patch]]:
            return thread.submit(at.session.upcoming)

        try:
            gates["a.svs"].set()
            first = at.session.upcoming()
            assert len(first) == AHEAD
            save(at, first[0], 1)
            second = upcoming().result(timeout=10)
            assert second[:5] == first[1:]
            (slide,) = at.slides.ready()
            new = [NewLabel(place, answers(at, 2), "none", "single", 1.0) for place in slide.order]
            at.session.save(new, {})
            waiting = upcoming()
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            gates["b.svs"].set()
            found = waiting.result(timeout=10)
            assert {at.slides.of(patch.place).added.name for patch in found} == {"b.svs"}  # type: ignore[union-attr]
        finally:
            for gate in gates.values():
                gate.set()


def test_a_patch_that_lacks_an_answer_comes_first_although_no_slide_is_open_yet(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides[:1], shipped) as at:
        save(at, at.session.upcoming(1)[0], 2)
        place = at.session.history()[0].place
    with EventStore(tmp_path / "l" / "labels.sqlite") as other:
        add_classes(other, "ann", ["necrosis"], {})
    files = [SlideFile(slides[0], slides[0].stem)]
    with open_desk(tmp_path / "l", files, "ann", wishes=Wishes(), classes=(), model=None, shipped=shipped) as at:
        assert at.session.upcoming(2)[0].place == place


def test_a_patch_that_lacks_an_answer_for_a_new_class_comes_first_and_keeps_its_label(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        (patch,) = at.session.upcoming(1)
        save(at, patch, 2)
        with EventStore(tmp_path / "l" / "labels.sqlite") as other:
            add_classes(other, "ann", ["necrosis"], {})
        again = at.session.upcoming(2)[0]
        assert (again.place, again.reason) == (patch.place, "again")
        assert at.session.counts().incomplete == 1
        save(at, again, 2, 3)
        assert at.session.upcoming(1)[0].place != patch.place
        assert at.session.counts().present == {1: 0, 2: 1, 3: 1}


def test_a_label_has_no_answer_for_a_class_that_the_page_did_not_show(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        (patch,) = at.session.upcoming(1)
        shown = answers(at, 2)
        with EventStore(tmp_path / "l" / "labels.sqlite") as other:
            add_classes(other, "ann", ["necrosis"], {})
        at.session.save([NewLabel(patch.place, shown, "none", "single", 1.0)], {})
        (again,) = at.session.history()
        assert again.label is not None
        assert again.label.answers == {1: "absent", 2: "present", 3: "unknown"}
        assert at.session.upcoming(1)[0].place == patch.place


def test_a_label_for_a_class_that_was_merged_meanwhile_counts_for_the_class_that_contains_it(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped, classes=("class-0", "class-1", "fat")) as at:
        (patch,) = at.session.upcoming(1)
        shown = answers(at, 3)
        with EventStore(tmp_path / "l" / "labels.sqlite") as other:
            merge_classes(other, "ann", "fat", "class-1")
        at.session.save([NewLabel(patch.place, shown, "none", "single", 1.0)], {})
        (again,) = at.session.history()
        assert again.label is not None
        assert again.label.answers == {1: "absent", 2: "present"}, "the page can show it"


def test_a_label_with_a_class_that_was_removed_meanwhile_is_refused_and_one_without_it_is_saved(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped, classes=("class-0", "class-1", "fat")) as at:
        (patch,) = at.session.upcoming(1)
        with_fat, without = answers(at, 3), answers(at, 1)
        with EventStore(tmp_path / "l" / "labels.sqlite") as other:
            remove_class(other, "ann", "fat")
        with pytest.raises(LabelingError, match="class 3 does not exist; reload the page"):
            at.session.save([NewLabel(patch.place, with_fat, "none", "single", 1.0)], {})
        at.session.save([NewLabel(patch.place, without, "none", "single", 1.0)], {})
        (again,) = at.session.history()
        assert again.label is not None
        assert again.label.answers == {1: "present", 2: "absent"}


def test_excluded_patches_come_next_and_blind_ones_are_never_in_a_grid(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        at.session.upcoming(60)
        unseen = [place for place, _ in zip(at.session.unseen(), range(60), strict=False)]
        assert not any(at.session.patch(place, "similar").blind for place in unseen)
        at.session.exclude(unseen[50:52])
        first = at.session.upcoming(2)
        assert [(p.place, p.reason) for p in first] == [(place, "excluded") for place in unseen[50:52]]
        save(at, first[0], 1)
        assert at.session.upcoming(1)[0].place == unseen[51]


def test_an_event_contains_everything_about_a_label(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides, shipped, model=shipped) as at:
        (patch,) = at.session.upcoming(1)
        new = NewLabel(patch.place, answers(at, 2), "none", "single", 2.345, {1: 0.25})
        at.session.save([new], {patch.place: patch.reason})
    with EventStore(tmp_path / "l" / "labels.sqlite") as store:
        event = store.read()[-1].event
    assert event == Labeled(
        place=patch.place, answers={1: "absent", 2: "present"}, view="single", reason=patch.reason,
        suggested={1: 0.25}, model=shipped.digest, seconds=2.35,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wishes", "classes", "message"),
    [
        (Wishes(side=96), (), "have side 64, not 96"),
        (Wishes(mpp=0.5), (), r"have mpp 1\.0, not 0\.5"),
        (Wishes(), ("a:b",), "--classes: .*printable"),
    ],
)
def test_a_folder_keeps_its_settings(
    tmp_path: Path, slides: list[Path], shipped: Bundle, wishes: Wishes, classes: tuple[str, ...], message: str
) -> None:
    with desk(tmp_path / "l", slides[:1], shipped):
        pass
    with (
        pytest.raises(LabelingError, match=message),
        desk(tmp_path / "l", slides[:1], shipped, wishes=wishes, classes=classes),
    ):
        pass


def test_one_class_is_refused_before_anything_is_saved(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with pytest.raises(LabelingError, match="at least two classes"), desk(tmp_path, slides, shipped, classes=["tumor"]):
        pass
    with EventStore(tmp_path / "labels.sqlite") as store:
        assert store.read() == []


def test_a_model_for_other_patches_is_refused(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with (
        pytest.raises(LabelingError, match=r"test expects patches of 64 px of 1 µm, but .* have 96 px"),
        desk(tmp_path, slides, shipped, model=shipped, wishes=Wishes(side=96)),
    ):
        pass


def test_a_slide_whose_name_is_not_utf_8_is_labeled_under_its_escaped_name(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    slide = tmp_path / os.fsdecode(b"caf\xe9.svs")
    shutil.copy(slides[0], slide)
    for labeled in (1, 2):  # the second session finds the slide and its labels again
        with desk(tmp_path / "l", [slide], shipped) as at:
            assert [one.added.name for one in at.slides.ready()] == ["caf\\udce9.svs"]
            save(at, at.session.upcoming(1)[0], 1)
            assert at.session.counts().labeled == len(at.session.history()) == labeled
    with EventStore(tmp_path / "l" / "labels.sqlite") as store:
        added = [one.event for one in store.read() if isinstance(one.event, SlideAdded)]
    assert [(one.name, one.patient) for one in added] == [("caf\\udce9.svs", "caf\\udce9")]
    with (tmp_path / "l" / "labels.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["slide"], row["patient"]) for row in rows] == [("caf\\udce9.svs", "caf\\udce9")] * 2
    drawing = Drawing("bob", [Annotation(("class-0",), shapely.box(0, 0, SIDE, SIDE))])
    with open_import(tmp_path / "l", "bob", Wishes(), [], {}) as folder:
        for _ in range(2):
            import_drawings(folder, SlideFile(slide, slide.stem), [drawing], {}, partial=False)
        events = [one.event.kind for one in folder.store.read()]
    assert (events.count("slide"), events.count("label")) == (1, 3)


def test_a_session_without_patients_keeps_those_of_the_folder(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    shared = {"classes": ("a", "b"), "wishes": Wishes(side=SIDE), "model": None, "shipped": shipped}
    for n, file in enumerate((SlideFile(slides[0], "P7"), SlideFile(slides[0]))):
        with open_desk(tmp_path / "l", [file], "ann", **shared) as at:  # type: ignore[arg-type]  # as above
            save(at, at.session.upcoming(1)[0], 1)
            assert [one.added.patient for one in at.slides.ready()] == ["P7"], n


@pytest.mark.parametrize("known", ["both", "first", "second"])
def test_slides_with_the_same_name_size_and_time_are_told_apart(tmp_path: Path, known: str) -> None:
    twins = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        twins.append(label_slide(tmp_path / folder / "HE.svs", 1))
    with twins[1].open("r+b") as file:
        file.seek(twins[1].stat().st_size // 2)
        file.write(b"another slide")
    for twin in twins:
        os.utime(twin, (1, 1))
    added = [
        SlideAdded(digest=slide_digest(t), stamp=slide_stamp(t), name=t.name, patient=t.parent.name) for t in twins
    ]
    assert len({one.stamp for one in added}) == 1
    assert len({one.digest for one in added}) == 2
    chosen = {"both": added, "first": added[:1], "second": added[1:]}[known]
    files = [SlideFile(path, path.parent.name) for path in twins]
    # One slide alone: its stamp is that of two known slides.
    for opened in [[0, 1], *([[0], [1]] if known == "both" else [])]:
        slides = Slides([files[n] for n in opened], STARTED, chosen)
        slides.wait()
        while slides.opened() < len(opened):
            time.sleep(0.01)
        assert [one.added for one in slides.ready()] == [added[n] for n in opened]
        slides.close()


def test_a_slide_that_cannot_be_opened_is_left_out(
    tmp_path: Path, slides: list[Path], shipped: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0.svs").write_bytes(b"not a slide")
    with desk(tmp_path / "l", [tmp_path / "0.svs", slides[0]], shipped) as at:
        assert len(at.session.upcoming(4)) == 4
        assert [one.added.name for one in at.slides.ready()] == ["a.svs"]
    assert "left out: 0.svs: cannot be opened" in caplog.text


def test_of_two_files_of_one_slide_the_first_is_kept(
    tmp_path: Path, shipped: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    first = label_slide(tmp_path / "A1.svs")
    shutil.copy(first, tmp_path / "B2.svs")
    with desk(tmp_path / "l", [tmp_path / "B2.svs", first], shipped) as at:
        save(at, at.session.upcoming(1)[0], 1)
        assert [(one.title, one.added.patient) for one in at.slides.ready()] == [("A1.svs", "A1")]
    (row,) = csv.DictReader((tmp_path / "l" / "labels.csv").read_text(encoding="utf-8").splitlines())
    assert (row["slide"], row["patient"]) == ("A1.svs", "A1")
    assert "B2.svs is the same slide as A1.svs, so it is skipped" in caplog.text


@pytest.mark.full
def test_slides_with_the_same_name_are_titled_by_the_folders_that_their_paths_lead_to(
    tmp_path: Path, shipped: Bundle
) -> None:
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        label_slide(tmp_path / folder / "scan.svs", seed=number)
    paths = [tmp_path / "a" / "scan.svs", tmp_path / "a" / ".." / "b" / "scan.svs"]
    with desk(tmp_path / "l", paths, shipped) as at:
        at.session.upcoming(1)
        while at.slides.opened() < 2:
            at.slides.wait_for_more(at.slides.opened())
        assert sorted(one.title for one in at.slides.ready()) == ["a/scan.svs", "b/scan.svs"]


@pytest.mark.full
def test_a_second_file_of_a_slide_replaces_a_first_that_cannot_be_opened(
    tmp_path: Path, shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = label_slide(tmp_path / "A1.svs")
    shutil.copy(first, tmp_path / "B2.svs")

    def open_second(path: Path, mpp: float | None) -> Slide:
        if path == first:
            raise SlideFormatError("A1.svs: cannot be opened")
        return open_slide(path, mpp)

    monkeypatch.setattr("pipeline.labeling.slides.open_slide", open_second)
    with desk(tmp_path / "l", [first, tmp_path / "B2.svs"], shipped) as at:
        assert [one.title for one in at.slides.ready()] == ["B2.svs"]
