"""If anything fails during a run, the error names the slide, the other slides finish and no files are left behind. When
the fault is gone, the same command gives the same bytes.

A worker that hangs (`--slide-timeout`) and one that the kernel ends for want of memory are in
`tests/pipeline/workers/cluster/test_cluster.py`.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from models.predictor import Predictor
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.formats import outputs
from pipeline.progress import Progress, no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.slide import recipe
from pipeline.slide.recipe import segment_slide
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess
from tests.pipeline.fakes import SMALL, color_predictor, published, region_slide, run_of
from tests.slides import PINK, painted, write_slide
from wsi.box import Box
from wsi.readers import READERS, OpenSlideReader

CONFIG = replace(SMALL, block_out=80, backend="openslide")
"""A dozen blocks."""

BAD_L0 = Box(512, 256, 64, 64)
"""The box in which the tests' readers fail."""


@dataclass(frozen=True)
class Slides:
    """Two slides, and the first one's result without faults."""

    a: Path
    b: Path
    expected: dict[str, bytes]

    def run(self, output: Path, predictor: Predictor | None = None, **options: object) -> list[SlideResult]:
        """Both in one batch; the progress of the first goes to `progress`, each result to `report`."""
        progress: Progress = options.get("progress", no_progress)  # type: ignore[assignment]
        report: Callable[[SlideResult], None] = options.get("report", lambda _: None)  # type: ignore[assignment]
        config: SegmentConfig = options.get("config", CONFIG)  # type: ignore[assignment]
        workers = InProcess(lambda _: predictor or color_predictor(), "any", config)
        jobs = [SlideJob(self.a), SlideJob(self.b)]
        return run_batch(jobs, output, workers, lambda job: progress if job.path == self.a else no_progress, report)

    def check_recovery(self, output: Path, least: int = 0) -> None:
        """The same command once the fault is gone: the bytes of an undisturbed run, and nothing else."""
        a, b = self.run(output)
        assert (a.status, b.status) == ("done", "skipped"), a.error
        assert a.resumed_blocks >= least
        assert published(output / "a") == self.expected
        assert names(output) == ["a", "b", "index.html", "summary.csv"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Slides:
    folder = tmp_path_factory.mktemp("slides")
    # Two levels: the thumbnail is read from the second, so that only the tiles meet the bad place.
    a = region_slide(folder / "a.svs", levels=(1, 8))
    b = write_slide(folder / "b.svs", painted((300, 250), ((20, 20, 250, 200), PINK)), mpp=1.0)
    result = segment_slide(a, folder / "undisturbed", color_predictor(), CONFIG)
    assert result.folder is not None
    return Slides(a, b, published(result.folder))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def thread_names() -> set[str]:
    """Of all threads but those that zarr keeps for its next reads and writes."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


@pytest.fixture(autouse=True)
def nothing_left(slides: Slides, tmp_path: Path) -> Iterator[None]:
    """No descriptors, threads or processes of a run outlive it, and no locks or half-written files."""
    process = psutil.Process()
    handles, threads, children = process.num_fds(), thread_names(), set(process.children())
    yield
    assert process.num_fds() <= handles
    assert thread_names() <= threads
    assert set(process.children()) <= children
    assert [path for path in tmp_path.rglob("*") if path.name.endswith((".lock", ".partial"))] == []


def at(stage: str, done: int, act: Callable[[], object]) -> Progress:
    """A progress callback that acts once, at one moment."""
    acted: list[object] = []

    def progress(now: str, steps: int, _: int) -> None:
        if (now, steps) == (stage, done) and not acted:
            acted.append(act())

    return progress


# --- the disk


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, so that errors come from the kernel."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Take all that is free."""
    with ballast.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left on device"):
        while True:
            file.write(bytes(4096))


def filling_first(writes: Callable[..., object], ballast: Path) -> Callable[..., object]:
    """A function that finds a full disk the first time it is called."""
    filled: list[bool] = []

    def full(*arguments: object, **named: object) -> object:
        if not filled:
            fill(ballast)
            filled.append(True)
        return writes(*arguments, **named)

    return full


WRITERS = {
    "write_features": outputs,
    "build_pyramid": outputs,
    "write_preview": outputs,
    "write_slide_page": recipe,
    "write_result": recipe,
}
STAGES = ["create_store", "blocks", *WRITERS]


def test_a_disk_that_is_full_at_any_stage_ends_the_slide_by_name_and_the_run_goes_on_later(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "check_resources", lambda *_: None)
    with mounted(tmp_path / "small", "size=6m") as small:
        ballast = small / "ballast"
        for number, stage in enumerate(STAGES):
            output = small / f"out{number}"
            progress = at("segmenting", 4, lambda: fill(ballast)) if stage == "blocks" else no_progress
            with monkeypatch.context() as patch:
                if stage != "blocks":
                    module = WRITERS.get(stage, recipe)
                    patch.setattr(module, stage, filling_first(getattr(module, stage), ballast))
                # Somebody frees some space once the first slide has failed.
                a, b = slides.run(output, progress=progress, report=lambda _: ballast.unlink(missing_ok=True))
            assert a.error.startswith(f"a.svs: the disk of {output} is full ("), (stage, a)
            assert "run the same command again, which resumes from the finished blocks" in a.error
            assert b.status == "done", (stage, b.error)
            assert not (output / "a").exists()
            assert not list(output.rglob("*.partial"))
            slides.check_recovery(output, least=0 if stage == "create_store" else 4 if stage == "blocks" else 12)
            for result in ("a", "b"):
                shutil.rmtree(output / result)


@pytest.mark.parametrize("free", [1, 6, 30])
def test_a_disk_without_free_inodes_is_not_called_full(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(recipe, "check_resources", lambda *_: None)
    with mounted(tmp_path / "small", "size=20m,nr_inodes=300") as small:
        ballast = small / "ballast"
        ballast.mkdir()
        while os.statvfs(small).f_favail > free:
            (ballast / secrets.token_hex(8)).touch()
        output = small / "out"
        a, b = slides.run(output, report=lambda _: shutil.rmtree(ballast, ignore_errors=True))
        assert re.fullmatch(
            rf"a\.svs: the disk of {output} can hold no more files \(\d+ inodes and (19|20) MiB free\); delete some "
            r"files, and run the same command again, which resumes from the finished blocks",
            a.error,
        )
        assert b.status == "done", b.error
        slides.check_recovery(output)


@pytest.mark.parametrize("number", [0, 2, 9, 40, 120, -2])
def test_a_write_that_fails_only_when_it_is_synced_ends_the_slide_alone(
    slides: Slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """File systems that allocate late, and network mounts, find out then. Negative: counted from the publishing on."""
    calls, sync = [0], os.fsync
    if number < 0:
        calls[0] = -(10**6)

    def failing(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == abs(number) + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    a, b = slides.run(tmp_path / "out", progress=at("publishing", 0, lambda: calls.__setitem__(0, 0)))
    assert (a.status, b.status) == ("failed", "done")
    assert a.error.startswith(f"a.svs: the disk of {tmp_path / 'out'} is full (")
    assert not (tmp_path / "out" / "a").exists()
    slides.check_recovery(tmp_path / "out", least=12 if number < 0 else 0)


def test_an_output_that_cannot_be_written_is_named_with_its_folder(slides: Slides, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for result in slides.run(tmp_path / "file"):
        assert result.error.startswith(f"{result.slide}.svs: cannot write {tmp_path / 'file'}: File exists; check that")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


def test_a_read_only_file_system_is_said_so(slides: Slides, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=6m") as disk:
        (disk / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for result in slides.run(disk / "out"):
            assert result.status == "failed"
            assert result.error.startswith(f"{result.slide}.svs: cannot write {disk / 'out'}")
            assert "Read-only file system" in result.error
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert names(disk / "out") == []
        assert [result.status for result in slides.run(disk / "out")] == ["done", "done"]


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_ends_every_slide_with_the_reason_and_leaves_no_file(
    slides: Slides, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused = f"{tmp_path / 'out'}: the file system refuses file locks ("
    for result in slides.run(tmp_path / "out"):
        assert result.status == "failed"
        assert result.error.startswith(refused)
    assert names(tmp_path / "out") == []
    # The table and the report are missing for the same reason.
    assert caplog.text.count(refused) >= 2


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
