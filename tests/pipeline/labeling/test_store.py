"""Events are saved once and for all, in one file that several people may write."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import LabelingError
from pipeline.labeling.events import EVENT, ClassAdded, Event, Recorded
from pipeline.labeling.folder import Wishes, add_classes, merge_classes, start_folder
from pipeline.labeling.labels import Labels
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


@pytest.mark.full
def test_each_commit_reaches_the_disk_also_on_a_mac(tmp_path: Path) -> None:
    with EventStore(tmp_path / "labels.sqlite") as store:
        settings = [store._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "fullfsync")]
    assert settings == [3, 1]  # 3: EXTRA


@pytest.mark.full
@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_write_a_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with EventStore(tmp_path / "a.sqlite") as store:
            store.append("ann", [STARTED])
    finally:
        os.umask(before)
    file = tmp_path / "a.sqlite"
    assert stat.S_IMODE(file.stat().st_mode) == mode
    file.chmod(0o640)
    with EventStore(file) as store:
        assert [one.event for one in store.read()] == [STARTED]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640, "a file that exists keeps its permissions"


@pytest.mark.full
def test_opening_a_file_again_leaves_the_lock_of_a_transaction_in_the_same_process(tmp_path: Path) -> None:
    file = tmp_path / "a.sqlite"
    code = (
        "import sqlite3, sys\n"
        "try: sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None).execute('BEGIN IMMEDIATE')\n"
        "except sqlite3.OperationalError as error: print(error)\n"
    )

    def while_locked(_: object) -> list[Event]:
        with pytest.raises(LabelingError, match="database is locked"):
            EventStore(file)
        done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
        assert done.stdout == "database is locked\n", "another process cannot write"
        return [STARTED]

    with EventStore(file) as store, pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.labeling.event_file.BUSY_SECONDS", 0)
        assert store.append_decided("ann", while_locked) == (1,)


def test_a_class_of_an_earlier_version_has_the_role_tissue(tmp_path: Path) -> None:
    with EventStore(tmp_path / "a.sqlite"):
        pass
    other = sqlite3.connect(tmp_path / "a.sqlite")
    event = '{"kind": "class", "id": 1, "name": "tumor", "color": [200, 0, 0]}'
    other.execute("INSERT INTO events (time, annotator, event) VALUES ('', '', ?)", (event,))
    other.commit()
    other.close()
    with EventStore(tmp_path / "a.sqlite") as store:
        assert [one.event for one in store.read()] == [TUMOR]
        assert Labels(store.read()).classes[1].role == "tissue"


def test_earlier_versions_can_read_a_class_with_the_role_tissue() -> None:
    glass = ClassAdded(id=3, name="glass", color=(9, 9, 9), role="background")
    assert json.loads(TUMOR.model_dump_json()) == {"kind": "class", "id": 1, "name": "tumor", "color": [200, 0, 0]}
    assert EVENT.validate_json(glass.model_dump_json()) == glass


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


class SlowReader(EventStore):
    """Others have time to write between a read and the write that follows it."""

    def read(self, after: int = 0) -> list[Recorded]:
        found = super().read(after)
        time.sleep(0.05)
        return found


def at_the_same_time(file: Path, *works: Callable[[EventStore], None]) -> Labels:
    """Do each work on a thread with a store of its own. Return the labels of the file afterwards."""
    barrier = threading.Barrier(len(works))

    def work(one: Callable[[EventStore], None]) -> None:
        with SlowReader(file) as store:
            barrier.wait()
            one(store)

    with ThreadPoolExecutor(len(works)) as threads:
        list(threads.map(work, works))
    with EventStore(file) as store:
        return Labels(store.read())


def test_classes_that_are_added_at_the_same_time_have_different_numbers(tmp_path: Path) -> None:
    def adding(who: str, store: EventStore) -> None:
        for n in range(3):
            add_classes(store, who, [f"{who} {n}"], {})

    labels = at_the_same_time(tmp_path / "a.sqlite", partial(adding, "ann"), partial(adding, "bob"))
    assert sorted(labels.classes) == list(range(1, 7))
    assert {one.name for one in labels.classes.values()} == {f"{who} {n}" for who in ("ann", "bob") for n in range(3)}


def test_of_two_merges_of_a_class_at_the_same_time_one_is_refused(tmp_path: Path) -> None:
    refused = []

    def merging(into: str, store: EventStore) -> None:
        for n in range(3):
            try:
                merge_classes(store, into, str(n), into)
            except LabelingError as error:
                refused.append(str(error))

    names = [*map(str, range(3)), "x", "y"]
    with EventStore(tmp_path / "a.sqlite") as store:
        add_classes(store, "ann", names, {})
    labels = at_the_same_time(tmp_path / "a.sqlite", partial(merging, "x"), partial(merging, "y"))
    assert [one.name for one in labels.classes.values()] == ["x", "y"]
    assert len(refused) == 3
    assert all("does not exist; the classes are" in text for text in refused)


def test_of_two_processes_that_start_a_folder_the_second_uses_the_settings_of_the_first(tmp_path: Path) -> None:
    found = []

    def starting(seed: int, store: EventStore) -> None:
        found.append(start_folder(store, "ann", Wishes(), Wishes(1.0, 64, seed, 0.1)))

    labels = at_the_same_time(tmp_path / "a.sqlite", *(partial(starting, seed) for seed in range(3)))
    assert labels.number == 1
    assert found == [labels.settings] * 3


def test_nothing_is_saved_if_the_decision_fails(tmp_path: Path) -> None:
    def fail(before: object) -> list[Event]:
        raise LabelingError("no")

    with EventStore(tmp_path / "a.sqlite") as store:
        with pytest.raises(LabelingError, match="no"):
            store.append_decided("ann", fail)
        assert store.append("ann", [STARTED]) == (1,), "the file is free again"


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
    with (
        EventStore(tmp_path / "a.sqlite") as store,
        pytest.raises(
            LabelingError,
            match=r"(?s)a\.sqlite: is damaged, or .* newer version .*; update wsi-segment, or restore a copy",
        ),
    ):
        store.read()
