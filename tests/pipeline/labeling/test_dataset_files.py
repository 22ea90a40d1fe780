"""The labels folder as a data set: what is in it, how it is split, and what it warns about."""

from __future__ import annotations

import csv
import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from models.bundle import Bundle
from pipeline.errors import DatasetFileError, LabelingError
from pipeline.labeling.dataset_files import DatasetWriter, rows_of, split_by_patient, warnings_of, write_dataset
from pipeline.labeling.events import (
    Answer,
    ClassAdded,
    ClassRenamed,
    Event,
    Labeled,
    Place,
    Recorded,
    SlideAdded,
    Undone,
)
from pipeline.labeling.folder import merge_classes
from pipeline.labeling.labels import Labels
from pipeline.labeling.session import NewLabel
from pipeline.labeling.store import EventStore
from pipeline.training.dataset import labeled_boxes, load_dataset, read_mask, read_rgb, samples
from pipeline.training.dataset_sections import Split
from pipeline.training.splits import hash_split
from tests.pipeline.labeling.desks import answers, desk
from tests.pipeline.labeling.events import SLIDE, STARTED, STROMA, TUMOR, fold, label, place
from wsi.errors import SlideReadError

PRESENT: tuple[Answer, ...] = ("present", "absent")
ABSENT: tuple[Answer, ...] = ("absent", "present")


def read(at: Place) -> np.ndarray:
    """Return pixels that tell the place."""
    return np.full((64, 64, 3), int(at.x_l0) % 256, np.uint8)


def on_slides(*answers: tuple[str, Answer, Answer]) -> Labels:
    """Return one labeled patch per (patient, tumor, stroma)."""
    slides = [SlideAdded(digest=who, stamp="", name=f"{who}.svs", patient=who) for who, *_ in answers]
    labels = [
        Labeled(place=Place(who, float(n), 0.0, 64, 1.0), answers={1: tumor, 2: stroma}, view="single", reason="random")
        for n, (who, tumor, stroma) in enumerate(answers)
    ]
    events: list[Event] = [STARTED, TUMOR, STROMA, *dict.fromkeys(slides), *labels]
    return Labels(Recorded(n, "", "ann", event) for n, event in enumerate(events, start=1))


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def test_the_folder_of_a_session_is_a_data_set_with_both_splits(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        new = [
            NewLabel(patch.place, answers(at, n // 2 % 2 + 1), "none", "single", 1.0)
            for n, patch in enumerate(at.session.upcoming(40))
        ]
        at.session.save(new, {})
        first = at.session.history()[0].place
        pixels = at.slides.pixels([first])[0]
    dataset = load_dataset(tmp_path / "l")
    assert (dataset.class_names, dataset.mpp) == (("class-0", "class-1"), 1.0)
    parts = {split: samples(dataset, split) for split in ("train", "val")}
    assert len(parts["train"]) + len(parts["val"]) == 40
    for chosen in parts.values():
        assert {tuple(labeled_boxes(dataset, one).present_BK[0]) for one in chosen} == {(True, False), (False, True)}
    own = next(one for chosen in parts.values() for one in chosen if one.name == first.id)
    assert np.array_equal(read_rgb(own), pixels)
    assert own.labels_K == (False, True)
    assert own.group in ("a", "b")


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_is_named_and_no_lock_file_stays(tmp_path: Path) -> None:
    with pytest.raises(LabelingError, match=f"^{tmp_path}: file locks fail on this file system"):
        write_dataset(tmp_path, fold(("ann", label(0, *PRESENT))), read)
    assert list(tmp_path.iterdir()) == []


def test_only_complete_labels_are_part_of_the_data_set(tmp_path: Path) -> None:
    events = [
        ("ann", label(0, *PRESENT)), ("ann", label(1, mark="unsure")), ("ann", label(2, mark="artifact")),
        ("ann", label(3, "present")), ("ann", label(4, *PRESENT)),
        ("bob", label(4, *ABSENT)), ("ann", label(5, *ABSENT)),
    ]  # fmt: skip
    assert write_dataset(tmp_path, fold(*events), read) == 0
    expected = {f"{place(x).id}.png" for x in (0, 5)}
    assert set(table(tmp_path)) == {file.name for file in (tmp_path / "patches").iterdir()} == expected
    assert len(list((tmp_path / "left-out").iterdir())) == 4
    row = table(tmp_path)[f"{place(5).id}.png"]
    assert (row["slide"], row["patient"], row["x_l0"], row["class tumor"], row["class stroma"]) == (
        "a.svs", "a", "5", "0", "1"
    )  # fmt: skip
    # Without its slide, a patch moves between the folders but is not read again.
    undone = fold(*events, ("ann", Undone(numbers=(5,))), ("ann", label(3, *PRESENT)))
    assert write_dataset(tmp_path, undone, lambda _: None) == 0
    assert set(table(tmp_path)) == {f"{place(x).id}.png" for x in (3, 5)}
    assert (np.asarray(Image.open(tmp_path / "patches" / f"{place(3).id}.png")) == 3).all()


def test_imported_patches_are_not_blind_until_somebody_labels_them_at_random(tmp_path: Path) -> None:
    blind = [x for x in range(40) if fold().is_blind(place(x))][:5]
    random_ = [label(x, *PRESENT).model_copy(update={"reason": "blind"}) for x in blind]
    imported = [one.model_copy(update={"view": "import", "reason": "correction"}) for one in random_]
    again = [one.model_copy(update={"reason": "again"}) for one in random_]
    events = [
        ("ann", random_[0]), ("ann", imported[1]), ("ann", imported[2]), ("bob", random_[2]),
        ("ann", imported[3]), ("ann", again[3]), ("ann", random_[4]), ("ann", again[4]),
    ]  # fmt: skip
    write_dataset(tmp_path, fold(*events), read)
    assert [table(tmp_path)[f"{place(x).id}.png"]["blind"] for x in blind] == ["1", "0", "1", "0", "1"]


def test_a_patch_whose_slide_is_not_open_is_left_out_until_it_is(tmp_path: Path) -> None:
    labels = fold(("ann", label(0, *PRESENT)), ("ann", label(1, *ABSENT)))
    assert write_dataset(tmp_path, labels, lambda at: read(at) if at == place(0) else None) == 1
    assert set(table(tmp_path)) == {f"{place(0).id}.png"}
    assert write_dataset(tmp_path, labels, read) == 0
    assert len(table(tmp_path)) == 2


def test_patches_that_cannot_be_read_are_named_and_left_out_until_they_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = fold(("ann", label(0, *PRESENT)), ("ann", label(1, *ABSENT)), ("ann", label(2, mark="artifact")))

    def failing(at: Place) -> np.ndarray:
        if at != place(0):
            raise SlideReadError("gone")
        return read(at)

    assert write_dataset(tmp_path, labels, failing) == 0
    assert set(table(tmp_path)) == {f"{place(0).id}.png"}
    assert "1 labeled patches are left out of the data set because they cannot be read: a.svs at (1, 0);" in caplog.text
    caplog.clear()
    assert write_dataset(tmp_path, labels, read) == 0
    assert (len(table(tmp_path)), caplog.text) == (2, "")


def test_an_unreadable_patch_is_read_again_only_at_the_end_of_the_session(tmp_path: Path) -> None:
    reads = []

    def failing(at: Place) -> np.ndarray:
        reads.append(at)
        if len(reads) == 1:
            raise SlideReadError("gone")
        return read(at)

    with EventStore(tmp_path / "labels.sqlite") as store:
        store.append("ann", [STARTED, TUMOR, STROMA, SLIDE, label(0, *PRESENT)])
        writer = DatasetWriter(tmp_path, store, failing)
        for _ in range(2):
            (tmp_path / "labels.csv").unlink(missing_ok=True)
            writer.changed()
            deadline = time.monotonic() + 30
            while not (tmp_path / "labels.csv").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        assert (reads, table(tmp_path)) == ([place(0)], {})
        writer.close()
    assert (len(reads), len(table(tmp_path))) == (2, 1)


def test_the_user_s_own_keys_are_kept_and_the_classes_follow(tmp_path: Path) -> None:
    labels = fold(("ann", label(0, *PRESENT)))
    write_dataset(tmp_path, labels, read)
    card = tmp_path / "dataset.toml"
    assert "Not stated: fill in the license" in load_dataset(tmp_path).card.licence
    text = (
        card.read_text(encoding="utf-8")
        .replace('"H&E patches labeled with wsi-label."', '"Köln \\"1\\""')
        .replace("mpp = 1.0", "mpp = 9.0")
    )
    card.write_text(text, encoding="utf-8")
    labels = fold(("ann", label(0, *PRESENT)), ("ann", ClassAdded(id=3, name='a "b" \\', color=(1, 2, 3))))
    write_dataset(tmp_path, labels, read)
    dataset = load_dataset(tmp_path)
    assert (dataset.card.description, dataset.mpp) == ('Köln "1"', 1.0)
    assert dataset.class_names == ("tumor", "stroma", 'a "b" \\')
    card.write_text("name = ", encoding="utf-8")
    with pytest.raises(LabelingError, match=r"dataset\.toml: is not valid TOML"):
        write_dataset(tmp_path, labels, read)


def test_the_scope_and_the_roles_of_classes_are_kept(tmp_path: Path) -> None:
    glass = ClassAdded(id=3, name="glass", color=(9, 9, 9), role="background")
    events: list[tuple[str, Event]] = [("ann", label(0, *PRESENT, "absent")), ("ann", glass)]
    card = tmp_path / "dataset.toml"

    def written() -> tuple[str, dict[str, str]]:
        write_dataset(tmp_path, fold(*events), read)
        dataset = load_dataset(tmp_path)
        return dataset.card.scope, {one.name: one.role for one in dataset.classes}

    assert written() == ("", {"tumor": "tissue", "stroma": "tissue", "glass": "background"})
    text = card.read_text(encoding="utf-8").replace('scope = ""', 'scope = "skin, H&E"')
    text = text.replace(', role = "background"', "").replace('"stroma", color', '"stroma", role = "background", color')
    card.write_text(text, encoding="utf-8")
    expected = {"tumor": "tissue", "stroma": "background", "glass": "tissue"}
    assert written() == ("skin, H&E", expected)
    assert written() == ("skin, H&E", expected)
    events += [("ann", ClassRenamed(id=2, name="lumen")), ("ann", ClassRenamed(id=2, name="hole"))]
    assert written() == ("skin, H&E", {"tumor": "tissue", "hole": "background", "glass": "tissue"})
    assert written() == ("skin, H&E", {"tumor": "tissue", "hole": "background", "glass": "tissue"})


def test_a_class_does_not_take_over_the_role_of_another_class_by_its_name(tmp_path: Path) -> None:
    events: list[tuple[str, Event]] = [
        ("ann", ClassAdded(id=3, name="glass", color=(9, 9, 9), role="background")),
        ("ann", ClassAdded(id=4, name="x", color=(8, 8, 8))),
    ]
    write_dataset(tmp_path, fold(*events), read)
    events += [("ann", ClassRenamed(id=3, name="empty")), ("ann", ClassRenamed(id=4, name="glass"))]
    for _ in range(2):
        write_dataset(tmp_path, fold(*events), read)
        roles = {one.name: one.role for one in load_dataset(tmp_path).classes}
        assert roles == {"tumor": "tissue", "stroma": "tissue", "empty": "background", "glass": "tissue"}
    events += [("ann", ClassRenamed(id=n, name=name)) for n, name in ((3, "y"), (4, "empty"), (3, "glass"))]
    write_dataset(tmp_path, fold(*events), read)
    roles = {one.name: one.role for one in load_dataset(tmp_path).classes}
    assert roles == {"tumor": "tissue", "stroma": "tissue", "glass": "background", "empty": "tissue"}


@pytest.mark.parametrize("classes", ["3", "[3]", '[{ color = "red" }]', '[{ name = 3, role = "background" }]'])
def test_classes_of_a_damaged_dataset_toml_are_written_again(tmp_path: Path, classes: str) -> None:
    (tmp_path / "dataset.toml").write_text(f"classes = {classes}")
    write_dataset(tmp_path, fold(), read)
    assert [(one.name, one.role) for one in load_dataset(tmp_path).classes] == [
        ("tumor", "tissue"), ("stroma", "tissue")
    ]  # fmt: skip


def test_a_role_that_does_not_exist_is_refused_in_training_and_not_lost(tmp_path: Path) -> None:
    write_dataset(tmp_path, fold(), read)
    card = tmp_path / "dataset.toml"
    card.write_text(card.read_text().replace('"stroma", color', '"stroma", role = "glass", color'))
    write_dataset(tmp_path, fold(), read)
    with pytest.raises(DatasetFileError, match="role"):
        load_dataset(tmp_path)


def test_merged_classes_are_merged_in_the_data_set(tmp_path: Path) -> None:
    with EventStore(tmp_path / "labels.sqlite") as store:
        extra = ClassAdded(id=3, name="fat", color=(1, 2, 3))
        store.append("ann", [STARTED, TUMOR, STROMA, extra, label(0, "absent", "absent", "present")])
        merge_classes(store, "ann", "fat", "stroma")
        write_dataset(tmp_path, Labels(store.read()), read)
    (row,) = table(tmp_path).values()
    assert (row["class tumor"], row["class stroma"], "class fat" in row) == ("0", "1", False)


def test_the_split_is_that_of_patients_if_both_parts_then_have_every_class() -> None:
    patients = [f"p{n}" for n in range(12)]
    rows = rows_of(on_slides(*((who, *answers) for who in patients for answers in (PRESENT, ABSENT))))  # type: ignore[arg-type]  # two answers
    by_patient = {who: {row.split for row in rows if row.patient == who} for who in patients}
    assert all(len(splits) == 1 for splits in by_patient.values())
    assert {row.split for row in rows} == {"train", "val"}


PATIENTS = st.lists(st.sets(st.integers(0, 2), max_size=3), min_size=1, max_size=7)
"""The classes of each patient."""


def by_patient(has: list[set[int]], seed: int) -> dict[str, str] | None:
    patches = [(f"{seed}-{n}", tuple(k in one for k in range(3))) for n, one in enumerate(has)]
    found = split_by_patient(patches)
    return None if found is None else dict(zip([who for who, _ in patches], found, strict=True))


@given(PATIENTS, st.integers(0, 99))
def test_a_split_by_patient_has_every_class_on_both_sides(has: list[set[int]], seed: int) -> None:
    found = by_patient(has, seed)
    if found is None:
        return
    whole = set().union(*has)
    for side in ("train", "val"):
        own = [one for one, split in zip(has, found.values(), strict=True) if split == side]
        assert own
        assert set().union(*own) == whole


@given(st.integers(2, 9), st.integers(0, 99))
def test_patients_who_have_every_class_are_always_apart(count: int, seed: int) -> None:
    found = by_patient([{0, 1, 2}] * count, seed)
    assert found is not None
    hashes = {who: hash_split(who, 0.8, 0.2) for who in found}
    moved = [who for who, split in found.items() if split != hashes[who]]
    assert len(moved) == (len(set(hashes.values())) == 1), "only if the hash puts all on one side, and then one"


def test_only_patients_with_a_missing_class_move_in_the_order_of_their_hash() -> None:
    # By their hashes, these are in training, the last one closest to validation.
    order = sorted((f"0-{n}" for n in range(12)), key=lambda who: hashlib.sha256(who.encode()).digest())
    train = [who for who in order if hash_split(who, 0.8, 0.2) == "train"][:5]
    first = dict.fromkeys(train, (True, True)) | {train[-1]: (True, False), train[1]: (False, False)}
    found = split_by_patient(list(first.items()))
    assert found == ["train", "train", "train", "val", "val"]
    assert split_by_patient([(who, (True, who == train[0])) for who in train]) is None, "only one has the second class"


def test_the_split_is_that_of_patches_if_patients_cannot_be_apart() -> None:
    labels = on_slides(*(("one", *(PRESENT if n % 2 else ABSENT)) for n in range(40)))  # type: ignore[arg-type]  # the same
    rows = rows_of(labels)
    assert 3 <= sum(row.split == "val" for row in rows) <= 14
    assert any("all labels come from one slide or patient" in text for text in warnings_of(labels))


def test_new_labels_do_not_move_old_ones_to_another_split() -> None:
    many = [("one", *(PRESENT if n % 2 else ABSENT)) for n in range(80)]
    before = {row.place: row.split for row in rows_of(on_slides(*many[:50]))}  # type: ignore[arg-type]  # the same
    after = {row.place: row.split for row in rows_of(on_slides(*many))}  # type: ignore[arg-type]  # the same
    assert {at: after[at] for at in before} == before


def test_few_labels_few_of_a_class_and_left_out_patches_are_warned_about() -> None:
    few = warnings_of(fold(("ann", label(0, *PRESENT)), ("ann", label(1, "present"))))
    assert [text.split(";")[0].split(",")[0] for text in few] == [
        "labeled patches: 1",
        "class tumor is present in 1 patches",
        "class stroma is present in 0 patches",
        "all labels come from one slide or patient",
        "1 patches are left out because a class has no answer or annotators disagree",
    ]
    patients = [f"p{n}" for n in range(30)]
    enough = on_slides(*((who, *answers) for who in patients for answers in (PRESENT, ABSENT)))  # type: ignore[arg-type]  # the same
    assert warnings_of(enough) == []


def test_a_class_that_no_patch_shows_can_be_removed_if_two_are_left() -> None:
    shown = ("ann", label(0, *PRESENT)), ("ann", label(1, "unknown", "present"))
    three = warnings_of(fold(*shown, ("ann", ClassAdded(id=3, name="loose fat", color=(1, 2, 3)))))
    hint = ", or remove the class: wsi-label classes FOLDER --remove 'loose fat'"
    assert [text.endswith(hint) for text in three] == [False, False, False, True, False]
    assert three[3].startswith("class loose fat is present in 0 patches; label at least 10 with it")
    assert not any("--remove" in text for text in [*three[:3], three[4], *warnings_of(fold(*shown))])


def outlined(*areas: dict[int, str]) -> Labels:
    """Return one patch per patient with the areas that were outlined in it."""
    slides = [SlideAdded(digest=f"p{n}", stamp="", name=f"p{n}.svs", patient=f"p{n}") for n in range(len(areas))]
    labels = [
        Labeled(
            place=Place(f"p{n}", 0.0, 0.0, 64, 1.0), answers={1: "present", 2: "present"}, source="qupath",
            view="import", reason="import", areas=one or None,
        )
        for n, one in enumerate(areas)
    ]  # fmt: skip
    events: list[Event] = [STARTED, TUMOR, STROMA, *slides, *labels]
    return Labels(Recorded(n, "", "ann", event) for n, event in enumerate(events, start=1))


SPLITS: tuple[Split, ...] = ("train", "val")
LEFT, REST = "POLYGON ((0 0, 24 0, 24 64, 0 64, 0 0))", "POLYGON ((16 0, 64 0, 64 60, 16 60, 16 0))"


def test_outlines_that_cover_patches_completely_become_masks_for_evaluation(tmp_path: Path) -> None:
    labels = outlined(*[{1: LEFT, 2: REST}] * 11, {})
    write_dataset(tmp_path, labels, read)
    dataset = load_dataset(tmp_path)
    expected = np.full((64, 64), 255, np.uint8)
    # The overlap and the rest have no known class.
    expected[:, :16], expected[60:, :24], expected[:60, 24:] = 0, 0, 1
    masks = {one.group: read_mask(dataset, one) for split in SPLITS for one in samples(dataset, split)}
    assert len(masks) == 12
    for patient, mask in masks.items():
        np.testing.assert_array_equal(mask, np.full_like(mask, 255) if patient == "p11" else expected)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "masks").iterdir()}
    write_dataset(tmp_path, labels, read)
    assert {file: file.stat().st_mtime_ns for file in times} == times, "masks that are up to date are left"
    # A class that no mask of the validation split shows: its score would be missing.
    write_dataset(tmp_path, outlined(*[{1: LEFT}] * 12), read)
    assert not (tmp_path / "masks").exists()
    assert {sample.mask for sample in samples(load_dataset(tmp_path), "val")} == {None}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("POLYGON ((0 0", "is not WKT"),
        ("POINT (1 2)", "is a Point, which has no area"),
        ("POLYGON ((0 0, 2 2, 2 0, 0 2, 0 0))", "is not a valid area"),
    ],
)
def test_a_label_with_an_area_that_is_none_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        outlined({1: text})
