"""If anything fails during a run, the error names the slide, the other slides finish and no files are left behind. When
the fault is gone, the same command gives the same bytes.

Faulty disks are in `test_faulty_disks.py`. A worker that hangs (`--slide-timeout`) and one that the kernel ends for
want of memory are in `tests/pipeline/workers/cluster/test_cluster.py`.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models.predictor import Predictor
from tests.full.two_slides import CONFIG, Slides, at
from tests.pipeline.fakes import color_predictor, published, run_of
from wsi.box import Box
from wsi.readers import READERS, OpenSlideReader

pytestmark = pytest.mark.usefixtures("nothing_left")

BAD_L0 = Box(512, 256, 64, 64)
"""The box in which the tests' readers fail."""


# --- the slide


class _FailingReader(OpenSlideReader):
    """Cannot read one place of level 0 of the slide `a`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._fails = path.stem == "a"

    def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
        common = box_lv.intersect(BAD_L0)
        if self._fails and level == 0 and common.width and common.height:
            raise OSError("Bogus marker length")
        return super().read(level, box_lv)


def test_more_unreadable_tiles_than_one_percent_end_the_slide_by_name_and_fewer_are_recorded_with_their_places(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CONFIG.max_bad_share == 0.01
    with monkeypatch.context() as patch:
        patch.setitem(READERS, "openslide", _FailingReader)
        a, b = slides.run(tmp_path / "out")
        assert (a.status, b.status) == ("failed", "done")
        assert a.error.startswith("a.svs: at least ")
        assert "tiles cannot be read (at most 1%), one at level-0 (x, y, width, height) (" in a.error
        assert not (tmp_path / "out" / "a").exists()

        a, _ = slides.run(tmp_path / "allowed", config=replace(CONFIG, max_bad_share=0.5))
        assert "tiles could not be read; their missing parts count as glass" in a.warnings[-1]
    run = run_of(tmp_path / "allowed" / "a")
    places = [Box(*place) for place in run["bad_tiles_l0"]]
    # Of an unreadable place the 256 px around it are given up.
    given_up = Box(512, 256, 256, 256)
    assert all((common := box.intersect(given_up)).width > 0 and common.height > 0 for box in places)
    assert any((common := box.intersect(BAD_L0)).width > 0 and common.height > 0 for box in places)
    assert run["tiles"]["unreadable"] >= len(places) == len(set(places)) >= 1
    slides.check_recovery(tmp_path / "out")


def test_a_slide_that_changes_while_it_runs_is_never_mixed(
    slides: Slides, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    whole, times = slides.a.read_bytes(), slides.a.stat()
    other = slides.b.read_bytes() + b"\0"
    for stage, done in (("segmenting", 4), ("publishing", 0)):
        with subtests.test(stage):
            output = tmp_path / stage
            try:
                a, b = slides.run(output, progress=at(stage, done, lambda: slides.a.write_bytes(other)))
            finally:
                slides.a.write_bytes(whole)
                os.utime(slides.a, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert (a.status, b.status) == ("failed", "done")
            assert a.error == (
                "a.svs: the file has changed since the run began; run the same command again when nothing writes to "
                "the file"
            )
            assert not (output / "a").exists()
            # It is the former one again: the blocks of before stand.
            slides.check_recovery(output, least=4)


def test_no_block_that_is_read_from_a_changed_slide_counts_as_done(slides: Slides, tmp_path: Path) -> None:
    times = slides.a.stat()
    later = (times.st_atime_ns, times.st_mtime_ns + 1)
    try:
        slides.run(tmp_path / "out", progress=at("segmenting", 4, lambda: os.utime(slides.a, ns=later)))
        journal = (tmp_path / "out" / ".a.work" / "journal.jsonl").read_bytes()
    finally:
        os.utime(slides.a, ns=(times.st_atime_ns, times.st_mtime_ns))
    # Those that had been read before that moment may be in it: at most as many as are in flight.
    assert 4 <= journal.count(b"\n") <= 4 + (CONFIG.num_workers or 1) + 1 < 12
    slides.check_recovery(tmp_path / "out", least=4)


def test_a_slide_that_vanishes_while_it_runs_is_named_and_gone_on_with_when_it_is_back(
    slides: Slides, tmp_path: Path
) -> None:
    away = tmp_path / "away.svs"
    try:
        a, b = slides.run(tmp_path / "out", progress=at("segmenting", 4, lambda: slides.a.rename(away)))
    finally:
        away.rename(slides.a)
    assert (a.status, b.status) == ("failed", "done")
    assert a.error.startswith(f"a.svs: no such file at {slides.a}")
    slides.check_recovery(tmp_path / "out", least=4)


# --- the device


def failing_predictor(error: BaseException, method: str = "predict_into") -> Predictor:
    """Fails at the sixth call of a method, and at no other."""
    predictor, calls = color_predictor(), [0]
    call = getattr(predictor, method)

    def failing(*arguments: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == 6:
            raise error
        return call(*arguments, **options)

    setattr(predictor, method, failing)
    return predictor


@pytest.mark.parametrize("method", ["predict_into", "on_device"])
@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported"),
            "a network failed on cpu (CUDA error: an illegal memory access was encountered), in the block at level-0 ",
            "pass -vv for details, and run the same command again; it resumes after the finished",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            "out of memory on cpu (CUDA out of memory. Tried to allocate 20.00 GiB.), in the block at level-0 ",
            "lower --batch-size or --num-workers, and run the same command again",
        ),
        (
            RuntimeError(
                "Exception from src/inference/src/cpp/infer_request.cpp:112:\nException from x.cpp:1:\nstd::bad_alloc"
            ),
            "out of memory on cpu (std::bad_alloc), in the block at level-0 ",
            "lower --batch-size or --num-workers, and run the same command again",
        ),
        (
            RuntimeError("can't start new thread"),
            "out of threads on cpu (can't start new thread), in the block at level-0 ",
            "raise the limit of threads and processes",
        ),
        (MemoryError(), "out of memory on cpu (no reason given), in the block at level-0 ", "lower --batch-size"),
    ],
    ids=["device", "device memory", "openvino", "threads", "memory"],
)
def test_a_device_that_fails_names_the_slide_and_the_block(
    slides: Slides, tmp_path: Path, error: BaseException, message: str, hint: str, method: str
) -> None:
    a, b = slides.run(tmp_path / "out", failing_predictor(error, method))
    assert (a.status, b.status) == ("failed", "done")
    assert a.error.startswith(f"a.svs: {message}(x, y, width, height) (")
    assert hint in a.error
    assert "\n" not in a.error
    slides.check_recovery(tmp_path / "out", least=1)


def test_a_reader_without_memory_ends_the_slide_and_not_its_tiles(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(OpenSlideReader):
        def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
            if level == 0 and box_lv.bottom > 600:
                raise MemoryError("cannot allocate 3 GiB")
            return super().read(level, box_lv)

    # As `_FailingReader`, of one slide only.
    opened = lambda path: Short(path) if path.stem == "a" else OpenSlideReader(path)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setitem(READERS, "openslide", opened)
        a, b = slides.run(tmp_path / "out")
    assert (a.status, b.status) == ("failed", "done")
    assert a.error == "a.svs: out of memory (cannot allocate 3 GiB); lower --batch-size or --num-workers"
    slides.check_recovery(tmp_path / "out")


# --- the clock


def test_a_clock_that_jumps_changes_nothing_and_no_time_is_negative(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, [0]

    def jumping() -> float:
        jumps[0] += 1
        return real() + (1e7 if jumps[0] % 2 else -1e7) * (1 + jumps[0] % 5)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    a, b = slides.run(tmp_path / "out")
    assert jumping() != pytest.approx(real(), abs=1e6)
    assert (a.status, b.status) == ("done", "done")
    assert published(tmp_path / "out" / "a") == slides.expected
    seconds = run_of(tmp_path / "out" / "a")["seconds"]
    assert {"plan", "blocks", "join", "pyramid", "preview", "total"} <= set(seconds)
    assert all(0 <= value < 1e6 for value in [*seconds.values(), a.seconds, b.seconds])
