"""What events add up to: classes that change, undo, several annotators, and their agreement."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score  # type: ignore[import-untyped]  # ships no stubs

from pipeline.labeling.agreement import agreements, cohen_kappa
from pipeline.labeling.events import ClassAdded, ClassesMerged, ClassRemoved, ClassRenamed, Undone
from pipeline.labeling.labels import Labels
from tests.pipeline.labeling.events import fold, label, place

NECROSIS = ClassAdded(id=3, name="necrosis", color=(9, 9, 9))


def test_the_latest_label_counts_and_undo_brings_back_the_one_before() -> None:
    first, second = label(0, "present", "absent"), label(0, "absent", "absent")
    labels = fold(("ann", first), ("ann", second))
    assert labels.label(place(0), "ann") == second
    labels = fold(("ann", first), ("ann", second), ("ann", Undone(numbers=(6,))))
    assert labels.label(place(0), "ann") == first
    labels = fold(("ann", first), ("ann", second), ("ann", Undone(numbers=(5, 6))))
    assert labels.label(place(0), "ann") is None
    assert labels.places() == []


def test_an_undo_of_another_label_or_of_none_changes_nothing() -> None:
    labels = fold(("ann", label(0, "present", "absent")), ("ann", Undone(numbers=(1, 99))))
    assert labels.is_labeled(place(0))
    assert [one.number for one in labels.labels_of("ann")] == [5]


def test_a_label_from_before_a_class_was_added_is_incomplete() -> None:
    old = label(0, "present", "absent")
    labels = fold(("ann", old), ("ann", NECROSIS))
    assert labels.answers(old) == {1: "present", 2: "absent", 3: "unknown"}
    assert not labels.is_complete(old)
    assert labels.is_complete(label(0, "present", "absent", "absent"))
    assert labels.is_complete(label(0, mark="artifact"))
    assert labels.next_class_id == 4


def test_a_renamed_class_keeps_its_labels() -> None:
    labels = fold(("ann", label(0, "present", "absent")), ("ann", ClassRenamed(id=1, name="carcinoma")))
    assert [one.name for one in labels.classes.values()] == ["carcinoma", "stroma"]
    assert labels.verdict(place(0)).answers == {1: "present", 2: "absent"}


@pytest.mark.parametrize(
    ("answers", "merged"),
    [
        (("present", "absent"), "present"), (("absent", "present"), "present"), (("unknown", "present"), "present"),
        (("absent", "absent"), "absent"), (("absent", "unknown"), "unknown"), ((), "unknown"),
    ],
)  # fmt: skip
def test_a_merged_class_is_present_wherever_one_of_its_parts_was(answers: tuple[str, ...], merged: str) -> None:
    one = label(0, *answers)  # type: ignore[arg-type]  # a table of plain strings
    labels = fold(("ann", one), ("ann", ClassesMerged(id=2, into=1)))
    assert labels.answers(one) == {1: merged}
    assert labels.next_class_id == 3


def test_classes_that_are_merged_one_after_the_other_end_in_the_last() -> None:
    one = label(0, "absent", "absent", "present")
    labels = fold(("ann", NECROSIS), ("ann", one), ("ann", ClassesMerged(id=3, into=2)),
                  ("ann", ClassesMerged(id=2, into=1)))  # fmt: skip
    assert labels.answers(one) == {1: "present"}


@pytest.mark.parametrize(
    ("changes", "classes", "answers"),
    [
        ([ClassesMerged(id=2, into=1)] * 2, {1: "tumor", 3: "necrosis"}, {1: "present", 3: "absent"}),
        ([ClassesMerged(id=1, into=2), ClassesMerged(id=2, into=1)], {2: "stroma", 3: "necrosis"},
         {2: "present", 3: "absent"}),
        ([ClassesMerged(id=2, into=1), ClassesMerged(id=2, into=3)], {1: "tumor", 3: "necrosis"},
         {1: "present", 3: "absent"}),
        ([ClassesMerged(id=2, into=1), ClassRenamed(id=2, name="x")], {1: "tumor", 3: "necrosis"},
         {1: "present", 3: "absent"}),
        ([ClassesMerged(id=2, into=1), ClassesMerged(id=3, into=2)], {1: "tumor"}, {1: "present"}),
    ],
)  # fmt: skip
def test_a_change_of_a_class_that_was_merged_before_is_ignored(
    changes: list[ClassesMerged | ClassRenamed], classes: dict[int, str], answers: dict[int, str]
) -> None:
    one = label(0, "present", "absent", "absent")
    labels = fold(("ann", NECROSIS), ("ann", one), *(("bob", change) for change in changes))
    assert {id_: found.name for id_, found in labels.classes.items()} == classes
    assert labels.answers(one) == answers


def test_answers_for_a_removed_class_do_not_count_and_its_number_is_never_used_again() -> None:
    one = label(0, "present", "absent", "unknown").model_copy(
        update={"areas": {1: "POLYGON EMPTY", 3: "POLYGON EMPTY"}}
    )
    labels = fold(("ann", NECROSIS), ("ann", one), ("ann", ClassRemoved(id=3)))
    assert labels.answers(one) == {1: "present", 2: "absent"}
    assert labels.is_complete(one)
    assert len(labels.areas(place(0))) == 2
    assert (labels.class_ids, labels.removed_ids, labels.next_class_id) == ({1, 2, 3}, {3}, 4)


def test_a_class_that_was_merged_into_a_removed_one_is_removed_too() -> None:
    one = label(0, "present", "absent", "absent")
    labels = fold(("ann", NECROSIS), ("ann", one), ("ann", ClassesMerged(id=3, into=2)), ("ann", ClassRemoved(id=2)),
                  ("bob", ClassesMerged(id=1, into=3)), ("bob", ClassRemoved(id=3)))  # fmt: skip
    assert labels.answers(one) == {1: "present"}
    assert (labels.removed_ids, labels.next_class_id) == ({2, 3}, 4)


def test_a_class_is_present_in_patches_where_the_current_label_of_an_annotator_says_so() -> None:
    merged = ClassesMerged(id=3, into=2)
    labels = fold(
        ("ann", NECROSIS),
        ("ann", label(0, "present", "absent", "absent")), ("bob", label(0, "absent", "absent", "absent")),
        ("ann", label(1, "present", "absent", "absent")), ("ann", label(1, "absent", "absent", "absent")),
        ("ann", label(2, "present", "unknown", "unknown")), ("ann", label(3, "absent", "absent", "present")),
        ("ann", label(4, "present", "absent", "absent")), ("ann", Undone(numbers=(12,))), ("ann", merged),
    )  # fmt: skip
    assert labels.places_with(1) == [place(0), place(2)]
    assert labels.places_with(2) == [place(3)]


def test_annotators_are_joined_by_majority_and_a_tie_is_unknown() -> None:
    votes = [("ann", label(0, "present", "absent")), ("bob", label(0, "absent", "absent"))]
    verdict = fold(*votes).verdict(place(0))
    assert (verdict.answers, verdict.disputed) == ({1: "unknown", 2: "absent"}, True)
    verdict = fold(*votes, ("cyd", label(0, "present", "absent"))).verdict(place(0))
    assert (verdict.answers, verdict.disputed) == ({1: "present", 2: "absent"}, True)


def test_a_mark_is_a_vote_to_leave_a_patch_out_and_a_tie_leaves_it_out() -> None:
    answered, marked = label(0, "present", "absent"), label(0, mark="artifact")
    nothing, answers = {1: "unknown", 2: "unknown"}, {1: "present", 2: "absent"}
    for votes, expected in (
        ([marked], (nothing, "artifact", False)),
        ([marked, answered], (nothing, "artifact", True)),
        ([answered, marked, marked], (nothing, "artifact", True)),
        ([answered, marked, answered], (answers, "none", True)),
        ([answered, answered], (answers, "none", False)),
    ):
        verdict = fold(*zip(("ann", "bob", "cyd"), votes, strict=False)).verdict(place(0))
        assert (verdict.answers, verdict.mark, verdict.disputed) == expected


def test_outlines_of_an_annotator_who_was_outvoted_are_left_out() -> None:
    square, left = "POLYGON ((0 0, 64 0, 64 64, 0 64, 0 0))", "POLYGON ((0 0, 9 0, 9 64, 0 64, 0 0))"
    tumor = label(0, "present", "absent").model_copy(update={"areas": {1: square}})
    stroma = label(0, "absent", "present")
    assert fold(("ann", tumor)).areas(place(0)) == (square, "")
    assert fold(("ann", tumor), ("bob", stroma), ("cyd", stroma)).areas(place(0)) == ("", "")
    both = stroma.model_copy(update={"areas": {1: left, 2: square}})
    assert fold(("ann", tumor), ("bob", both), ("cyd", stroma)).areas(place(0)) == (left, square)
    assert fold(("ann", tumor), ("bob", label(0, mark="artifact"))).areas(place(0)) == ("", "")


@given(st.integers(0, 2**31))
def test_the_state_does_not_depend_on_when_it_was_read(seed: int) -> None:
    rng = random.Random(seed)
    events = [
        (rng.choice("ab"), Undone(numbers=(rng.randint(4, 20),)) if rng.random() < 0.3
         else label(rng.randint(0, 3), *rng.choices(("present", "absent"), k=2)))
        for _ in range(rng.randint(0, 15))
    ]  # fmt: skip
    whole, steps = fold(*events), Labels()
    for record in _records(events):
        steps.apply(record)
        steps.places()
    for x in range(4):
        for who in "ab":
            # Slow and simple: the last of the annotator's labels that no later event undoes.
            own = [
                event for number, (name, event) in enumerate(events, start=5)
                if name == who and event.kind == "label" and event.place == place(x)
                and not any(e.kind == "undo" and number in e.numbers for _, e in events[number - 4 :])
            ]  # fmt: skip
            assert whole.label(place(x), who) == steps.label(place(x), who) == (own[-1] if own else None)


def _records(events: list) -> list:  # type: ignore[type-arg]  # of the events above
    from pipeline.labeling.events import Recorded
    from tests.pipeline.labeling.events import SLIDE, STARTED, STROMA, TUMOR

    first = [("ann", event) for event in (STARTED, TUMOR, STROMA, SLIDE)]
    return [Recorded(n, "", who, event) for n, (who, event) in enumerate([*first, *events], start=1)]


def test_the_blind_share_is_fixed_by_the_seed() -> None:
    labels = fold()
    blind = [labels.is_blind(place(x)) for x in range(400)]
    assert 160 < sum(blind) < 240
    assert blind == [fold().is_blind(place(x)) for x in range(400)]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_kappa_is_that_of_scikit_learn(pairs: list[tuple[bool, bool]]) -> None:
    ours = cohen_kappa(pairs)
    if ours is None:
        assert len({value for pair in pairs for value in pair}) == 1
    else:
        assert ours == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))


def test_two_annotators_are_compared_per_class_on_blind_patches_only() -> None:
    blind = [x for x in range(40) if fold().is_blind(place(x))][:4]
    seen = next(x for x in range(40) if not fold().is_blind(place(x)))
    ann = [label(x, "present" if i < 2 else "absent", "absent") for i, x in enumerate(blind)]
    bob = [label(x, "present" if i < 1 else "absent", "absent") for i, x in enumerate(blind)]
    labels = fold(
        *(("ann", one) for one in ann), *(("bob", one) for one in bob),
        ("ann", label(seen, "present", "absent")), ("bob", label(seen, "absent", "absent")),
    )  # fmt: skip
    tumor, stroma = agreements(labels)
    assert (tumor.annotators, tumor.class_name, tumor.patches, tumor.same) == (("ann", "bob"), "tumor", 4, 3)
    assert tumor.kappa == pytest.approx(0.5)
    assert (stroma.class_name, stroma.patches, stroma.same, stroma.kappa) == ("stroma", 4, 4, None)


def test_imported_labels_of_blind_patches_are_not_compared() -> None:
    first, second = [x for x in range(40) if fold().is_blind(place(x))][:2]
    imported = label(first, "present", "absent").model_copy(update={"view": "import", "reason": "correction"})
    both = [(who, label(second, "present", "absent")) for who in ("ann", "bob")]
    for other in (imported, label(first, "present", "absent")):
        tumor, _ = agreements(fold(("ann", imported), ("bob", other), *both))
        assert (tumor.patches, tumor.same) == (1, 1)
