"""What a task reports to the process that waits for it."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import SegmentConfig, resolve
from pipeline.errors import Cancelled, ClusterError, OutputError
from pipeline.formats.ome_zarr import MapSpec, MapStore
from pipeline.slide.blocks import BlockWork
from pipeline.workers.cluster import tasks
from pipeline.workers.cluster.tasks import ModelRef, TaskContext, check_computation, check_folder, make_band, work_of
from tests.models.networks import make_card
from tests.pipeline.fakes import COLORS, CPU
from tests.slides import small_slide
from wsi.box import Box
from wsi.grid import Block, Grid
from wsi.slide import open_slide
from wsi.tissue import Tissue


class FakeTask:
    """A task that the scheduler cancels while it runs, or does not cancel."""

    def __init__(self, *, cancelled: bool) -> None:
        self.cancelled = cancelled
        self.sent: list[str] = []

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, kind: str, **_: object) -> None:
        self.sent.append(kind)


@pytest.mark.parametrize(("cancelled", "sent"), [(False, ["started", "ended"]), (True, ["started"])])
def test_a_task_that_the_scheduler_took_back_reports_no_end(
    monkeypatch: pytest.MonkeyPatch, cancelled: bool, sent: list[str]
) -> None:
    task = FakeTask(cancelled=cancelled)
    monkeypatch.setattr(tasks, "_RunningTask", lambda _: task)

    def work(_: Any) -> object:
        raise Cancelled("the task was cancelled")

    tasks._run(TaskContext("id", "topic", ModelRef("model", "digest"), SegmentConfig()), work)
    assert task.sent == sent


def test_tifffile_logs_nothing_in_a_task(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tifffile = logging.getLogger("tifffile")
    monkeypatch.setattr(tifffile, "level", logging.NOTSET)
    monkeypatch.setattr(tasks, "_RunningTask", lambda _: FakeTask(cancelled=False))
    context = TaskContext("id", "topic", ModelRef("model", "digest"), SegmentConfig())
    tasks._run(context, lambda _: tifffile.error("a damaged tag, without the name of the slide"))
    assert caplog.records == []
    tifffile.setLevel(logging.NOTSET)  # clears what the logger remembers of its level


def test_a_band_is_small_and_keeps_the_layers_of_the_tissue(tmp_path: Path) -> None:
    mask_HW = np.zeros((2000, 3000), bool)
    mask_HW[500:1500, 500:2500] = True
    left_out_HW = np.where(mask_HW, 0, 3).astype(np.uint8)
    tissue = Tissue(mask_HW, left_out_HW, 16.0, 8.0, ("a warning",), (244.0, 243.0, 244.0), fat_HW=~mask_HW)
    with open_slide(small_slide(tmp_path / "a.svs")) as slide:
        grid = Grid(0, (0, 0), 1.0, 1.0, 1.0, (300, 250), 64, 4, 64)
        store = MapStore(tmp_path / "store", MapSpec("a", grid.size_out, make_card(COLORS).classes, grid.mpp_out))
        work = BlockWork(slide.info, grid, tissue, resolve(SegmentConfig(), CPU), store, tmp_path)
    (tmp_path / "identity.json").write_text("{}")
    band = make_band(work, [Block(3, Box(0, 0, 64, 64))])
    assert len(pickle.dumps(band)) < 200_000
    again = work_of(band)
    assert again.tissue.digest == tissue.digest
    assert (again.info, again.grid, again.settings, again.folder) == (work.info, work.grid, work.settings, tmp_path)
    assert band.blocks == (Block(3, Box(0, 0, 64, 64)),)


def test_a_band_is_not_computed_in_another_way_than_its_slide() -> None:
    asked = resolve(SegmentConfig(num_workers=1), CPU)
    check_computation(asked, resolve(SegmentConfig(num_workers=7), CPU), "a.svs")
    for change, message in {"threads": "threads 2 instead of 1", "processor": "processor other instead of any"}.items():
        own = replace(CPU, threads=2) if change == "threads" else replace(CPU, processor="other")
        with pytest.raises(ClusterError, match=rf"a\.svs: a worker computes with {message}, .*--spread slides"):
            check_computation(asked, resolve(SegmentConfig(), own), "a.svs")
    # OpenVINO returns the same bits with any number of threads.
    first, second = (replace(CPU, runtime="openvino", threads=threads) for threads in (1, 2))
    check_computation(resolve(SegmentConfig(), first), resolve(SegmentConfig(), second), "a.svs")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EROFS, "Read-only file system; mount the folder read-write"),
        (errno.EDQUOT, "the disk quota for "),
    ],
)
def test_a_folder_that_can_be_read_but_not_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    probe = tmp_path / "x.probe"
    probe.write_text("a", encoding="utf-8")
    assert check_folder(probe, "a") == ""
    assert check_folder(probe, "b") == "has another folder at this path; mount the same folder there"

    def refuses(path: Path, *_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", refuses)
    assert check_folder(probe, "a").startswith(f"cannot write to the folder: {reason}")
    assert list(tmp_path.iterdir()) == [probe]


def test_a_write_error_names_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "get_worker", lambda: SimpleNamespace(address="tcp://w:1"))
    writing, read_only = tasks._write_errors_name_the_worker, OSError(errno.EROFS, "Read-only file system", "/out/a")
    with pytest.raises(OSError, match=r"Read-only file system on worker tcp://w:1: '/out/a'") as of_a_band, writing():
        raise read_only
    assert of_a_band.value.errno == errno.EROFS
    with pytest.raises(OutputError, match=r"^a\.svs: cannot write \(on worker tcp://w:1\)$"), writing():
        raise OutputError("a.svs: cannot write") from read_only
    with pytest.raises(OutputError, match=r"^a: holds another result$"), writing():
        raise OutputError("a: holds another result")
