"""How many files the slides of a session keep open."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.labeling.slides import MOST_OPEN, ReadySlide, SlideFile, Slides
from tests.pipeline.labeling.desks import label_slide
from tests.pipeline.labeling.events import STARTED

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the open files"),
]

COUNT = MOST_OPEN + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with more slides than may stay open."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(COUNT):
        label_slide(folder / f"{number:02}.svs", number)
    return folder


@pytest.fixture
def opened(folder: Path) -> Iterator[Slides]:
    slides = Slides([SlideFile(path) for path in sorted(folder.iterdir())], STARTED, [])
    try:
        while (done := slides.opened()) < COUNT:
            slides.wait_for_more(done)
        yield slides
    finally:
        slides.close()


def handles(folder: Path) -> Counter[str]:
    """Return how many open handles each file of a folder has in this process."""
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = link.readlink()
        except FileNotFoundError:  # closed by now, as that of this list
            continue
        if target.parent == folder:
            found[target.name] += 1
    return found


def read(slides: Slides, ready: ReadySlide) -> None:
    slides.pixels([ready.order[0]])


def test_only_the_slides_that_were_read_last_keep_their_files_open(folder: Path, opened: Slides) -> None:
    assert handles(folder) == {}, "opening leaves no handle"
    ready = opened.ready()
    for one in ready:
        read(opened, one)
    assert handles(folder) == {one.added.name: 1 for one in ready[-MOST_OPEN:]}
    read(opened, ready[-MOST_OPEN])  # now the most recently used one
    read(opened, ready[0])
    kept = [*ready[-MOST_OPEN + 1 :], ready[-MOST_OPEN], ready[0]]
    assert handles(folder).keys() == {one.added.name for one in kept[-MOST_OPEN:]}
    opened.close()
    assert handles(folder) == {}


def test_a_slide_that_a_thread_reads_stays_open(folder: Path, opened: Slides) -> None:
    first, *others = opened.ready()
    read(opened, first)
    with opened.reading(first):
        for one in others:
            read(opened, one)
        assert handles(folder)[first.added.name] == 1
        assert len(handles(folder)) == MOST_OPEN
    read(opened, others[0])
    assert handles(folder)[first.added.name] == 0


def test_threads_that_read_all_slides_get_the_right_pixels(
    folder: Path, opened: Slides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.labeling.slides.MOST_OPEN", 1)
    places = [place for one in opened.ready() for place in one.order[:2]]
    expected = {place: opened.pixels([place])[0] for place in places}
    threads = 4
    start = threading.Barrier(threads)

    def read_all(number: int) -> bool:
        start.wait()
        order = np.random.default_rng(number).permutation(len(places) * 5) % len(places)
        return all(np.array_equal(opened.pixels([places[i]])[0], expected[places[i]]) for i in order)

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(read_all, range(threads))) == [True] * threads
    read(opened, opened.ready()[0])
    assert handles(folder) == {"00.svs": 1}, "at most one handle stays, and it belongs to this thread"
