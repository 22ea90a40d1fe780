"""Labels survive kills: what was reported as saved is there, and what was saved together is there together."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import LabelingError
from pipeline.labeling.store import EventStore
from tests.pipeline.labeling.desks import label_slide
from tests.pipeline.labeling.events import STARTED, label
from tests.pipeline.labeling.sessions import ask, started
from tests.repository import REPOSITORY

WRITER = """
import sys
from pathlib import Path
from pipeline.labeling.store import EventStore
from tests.pipeline.labeling.events import label
store = EventStore(Path(sys.argv[1]))
first = store.read()[-1].number if store.read() else 0
print("open", flush=True)
x = first
while True:
    numbers = store.append("ann", [label(x + i, "present", "absent") for i in range(7)])
    x += 7
    print(numbers[-1], flush=True)
"""
"""Saves batches of seven labels, like a grid, and prints the number of the last label after each."""


def killed_writer(file: Path, seconds: float, stop: bool) -> int:
    """Kill a writer this long after its first output. Return the last number that it reported."""
    command = [sys.executable, "-c", WRITER, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGSTOP if stop else signal.SIGKILL)
        if stop:
            time.sleep(0.05)
            process.kill()
        reported = [int(line) for line in process.stdout.read().split()]
    return reported[-1] if reported else 0


@pytest.mark.parametrize("stop", [False, True], ids=["killed", "stopped, then killed"])
def test_every_label_that_was_reported_as_saved_survives_a_kill(tmp_path: Path, stop: bool) -> None:
    rng, file, before = random.Random(3), tmp_path / "labels.sqlite", 0
    for _ in range(8):
        reported = killed_writer(file, rng.uniform(0, 0.15), stop)
        with EventStore(file) as store:
            records = store.read()
        assert [one.number for one in records] == list(range(1, len(records) + 1))
        assert len(records) >= max(reported, before)
        assert len(records) % 7 == 0, "a grid was saved in part"
        before = len(records)
    assert before > 0
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def refusal(file: Path) -> str:
    """Return the error of reading a file of labels, or nothing if all of its events are valid."""
    try:
        with EventStore(file) as store:
            store.read()
    except LabelingError as error:
        return str(error)
    return ""


def test_a_damaged_file_is_refused_by_name_or_its_events_are_all_valid(tmp_path: Path) -> None:
    file, rng, refused = tmp_path / "labels.sqlite", random.Random(5), 0
    with EventStore(file) as store:
        store.append("ann", [STARTED, *(label(x, "present") for x in range(200))])
    whole = file.read_bytes()
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        refused += "labels.sqlite" in refusal(file)
    assert refused > 50


def test_a_killed_server_has_every_label_that_the_page_showed_as_saved(tmp_path: Path) -> None:
    slide = label_slide(tmp_path / "a.svs")
    rng, answered = random.Random(9), []
    for _ in range(2):
        with started(slide, "-o", tmp_path / "l", "--classes", "a,b") as process:
            assert process.stdout is not None
            url = process.stdout.readline().split()[0]
            state = ask(url, "state.json")
            for _ in range(rng.randint(1, 3)):
                patch = state["upcoming"][0]
                assert patch["id"] not in answered, "a labeled patch came again"
                new = {"patch": patch["id"], "answers": {1: "absent", 2: "present"}, "reason": patch["reason"],
                       "mark": "none", "view": "single", "seconds": 1.0, "suggested": None}  # fmt: skip
                state = ask(url, "labels", {"labels": [new]})
                answered.append(patch["id"])
            process.kill()
            process.communicate()
        with EventStore(tmp_path / "l" / "labels.sqlite") as store:
            assert [one.event.place.id for one in store.read() if one.event.kind == "label"] == answered
    # The files of the data set follow when a session ends.
    with started(slide, "-o", tmp_path / "l") as process:
        assert process.stdout is not None
        ask(process.stdout.readline().split()[0], "state.json")  # answers when the slide is open
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert len((tmp_path / "l" / "labels.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(answered)
