"""Events are saved once and for all, in one file that several people may write."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from pipeline.errors import LabelingError
from pipeline.labeling.store import EventStore
from tests.pipeline.labeling.events import SLIDE, STARTED, TUMOR, label


def test_events_come_back_as_they_were_saved_and_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "new" / "labels.sqlite"
    with EventStore(file) as store:
        assert store.append("ann", [STARTED, TUMOR]) == (1, 2)
        assert store.append("bob", [label(64, "present", "unknown")]) == (3,)
    with EventStore(file) as store:
        found = store.read()
        assert [one.event for one in found] == [STARTED, TUMOR, label(64, "present", "unknown")]
        assert [(one.number, one.annotator) for one in found] == [(1, "ann"), (2, "ann"), (3, "bob")]
        assert [one.number for one in store.read(after=2)] == [3]


@pytest.mark.parametrize("statement", ["UPDATE events SET annotator = 'x'", "DELETE FROM events"])
def test_no_program_can_change_or_delete_an_event(tmp_path: Path, statement: str) -> None:
    with EventStore(tmp_path / "a.sqlite") as store:
        store.append("ann", [STARTED])
    other = sqlite3.connect(tmp_path / "a.sqlite")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute(statement)
    other.close()


def test_labels_are_a_table_for_other_programs(tmp_path: Path) -> None:
    with EventStore(tmp_path / "a.sqlite") as store:
        store.append("ann", [STARTED, label(64, "present", "absent", mark="unsure")])
    other = sqlite3.connect(tmp_path / "a.sqlite")
    row = other.execute("SELECT number, annotator, slide, x_l0, side, mpp, mark, answers FROM labels").fetchone()
    other.close()
    assert row == (2, "ann", "ab", 64.0, 64, 1.0, "unsure", '{"1":"present","2":"absent"}')


def test_two_people_write_at_the_same_time_and_every_label_is_kept(tmp_path: Path) -> None:
    stores = [EventStore(tmp_path / "a.sqlite") for _ in range(2)]

    def write(which: int) -> None:
        for x in range(15):
            stores[which].append(str(which), [label(x, "present")])

    threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stores[0].read()
    assert [one.number for one in found] == list(range(1, 31))
    for which in ("0", "1"):
        assert [one.event for one in found if one.annotator == which] == [label(x, "present") for x in range(15)]
    for store in stores:
        store.close()


def test_a_label_that_cannot_be_saved_is_an_error_and_leaves_no_part(tmp_path: Path) -> None:
    with EventStore(tmp_path / "a.sqlite") as store:
        store.append("ann", [STARTED])
        store._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(LabelingError, match=r"a\.sqlite: the labels are NOT saved .*full"):
            store.append("ann", [label(x, "present") for x in range(500)])
        store._connection.execute("PRAGMA max_page_count = 1000000")
        assert store.append("ann", [label(1, "present")])
        assert len(store.read()) == 2


@pytest.mark.parametrize("content", [b"no database at all" * 100, None])
def test_another_file_is_refused_and_not_changed(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "a.sqlite"
    if content is None:
        other = sqlite3.connect(file)
        other.execute("CREATE TABLE mine (x)")
        other.commit()
        other.close()
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(LabelingError, match=r"a\.sqlite: (is not a file of labels|cannot be opened)"):
        EventStore(file)
    assert file.read_bytes() == before


def test_an_event_of_another_version_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with EventStore(tmp_path / "a.sqlite") as store:
        store.append("ann", [SLIDE])
    other = sqlite3.connect(tmp_path / "a.sqlite")
    other.execute("""INSERT INTO events (time, annotator, event) VALUES ('', '', '{"kind": "dance"}')""")
    other.commit()
    other.close()
    with EventStore(tmp_path / "a.sqlite") as store, pytest.raises(LabelingError, match=r"a\.sqlite: is damaged"):
        store.read()
