"""The processes that crash tests kill: one that has torch and the networks loaded and forks a run for each order.

Nothing of the product is changed: what a run does to its files is seen through Python's audit events, and `os.fsync`
is watched from here. Files that C++ writes by itself (GeoParquet) are seen when they are synced.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from models.predictor import Predictor
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.formats import preview
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess, load_predictor

CONFIG = SegmentConfig(block_out=16, num_workers=2, device="cpu", runtime="torch", min_area_um2=400.0)

MODULES = ("distributed", "pandas", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "pyarrow.compute")
"""What a run imports on its way: seconds that each forked process would take again."""


@dataclass(frozen=True)
class Order:
    """A run, and how it is to end."""

    slide: str
    output: str
    trace: str
    """The file for its steps, one JSON list per line: the kind of step, then paths relative to the output."""
    canvas_m: int | None = None
    force: bool = False
    die_at: int | None = None
    """The number of the step, from 0, at which the run kills itself; None: it runs to its end."""
    die_on: str | None = None
    """Or what that step and the one before look like: a pattern for "> kind paths > kind paths"."""
    torn: int | None = None
    """If that step writes a file, the number of random bytes in that file."""


class Steps:
    """Record what a run does below its output folder, and kill the run at the given step."""

    def __init__(self, order: Order) -> None:
        self._root = Path(order.output)
        self._order = order
        self._count = 0
        self._last = "begun"
        # Every step is in the kernel's hands before the process can die.
        self._trace = os.open(order.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lock = threading.RLock()
        self._fsync = os.fsync

    def watch(self) -> None:
        """From here on until the process ends."""
        os.fsync = self._watched_fsync  # type: ignore[assignment] # only descriptors are synced here
        sys.addaudithook(self._audit)

    def step(self, kind: str, *paths: str) -> None:
        """Note a step that is about to be done, or die."""
        with self._lock:
            last, self._last = self._last, " ".join((kind, *paths))
            on = self._order.die_on
            if self._count == self._order.die_at or (on and re.search(on, f"> {last} > {self._last}")):
                if kind == "write" and self._order.torn is not None:
                    self._tear(self._root / paths[0], self._order.torn)
                os.kill(os.getpid(), signal.SIGKILL)
            self._count += 1
            os.write(self._trace, json.dumps([kind, *paths]).encode() + b"\n")

    def _tear(self, path: Path, size: int) -> None:
        self._order = replace(self._order, die_at=None, die_on=None)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if path.name == "journal.jsonl" else os.O_TRUNC)
        os.write(os.open(path, flags), random.Random(size).randbytes(size))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._below("write", arguments[0])
        elif event in ("os.rename", "os.link"):
            self._below("rename" if event == "os.rename" else "link", arguments[0], arguments[1])
        elif event in ("os.mkdir", "os.rmdir", "os.remove"):
            self._below(event.removeprefix("os."), _place(arguments[0], arguments[-1]))

    def _below(self, kind: str, *paths: str | bytes | os.PathLike[str]) -> None:
        places = [Path(os.fsdecode(path)).absolute() for path in paths]
        # Many ask for a folder that is there already.
        if all(place.is_relative_to(self._root) for place in places) and not (kind == "mkdir" and places[0].exists()):
            if kind == "rename" and places[0].is_dir():
                self.step("moving", *(str(p.relative_to(self._root)) for p in places[0].rglob("*") if p.is_file()))
            self.step(kind, *(str(place.relative_to(self._root)) for place in places))

    def _watched_fsync(self, descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        if place.is_relative_to(self._root):
            name = str(place.relative_to(self._root))
            if place.name == "journal.jsonl":
                last = json.loads(place.read_bytes().splitlines()[-1])
                files = json.loads(last["record"])["files"]
                self.step("line", *(str(Path(name).parent / file) for file in files))
            self.step("sync", name)
            there = [str(p.relative_to(self._root)) for p in place.iterdir()] if place.is_dir() else []
            self._fsync(descriptor)
            self.step("synced folder" if place.is_dir() else "synced", name, *there)
        else:
            self._fsync(descriptor)


def _place(path: str | bytes | os.PathLike[str], folder: int) -> str:
    """A path that may be relative to an open folder, as those of `shutil.rmtree` are."""
    name = os.fsdecode(path)
    return name if folder == -1 else str(Path(f"/proc/self/fd/{folder}").readlink() / name)


class _Watched(Predictor):
    """A predictor whose calls are steps."""

    steps: Steps

    def predict_into(
        self, probs: Any, rgb_HWC: Any, places: Any, corners: Any, before_batch: Any = None, **options: Any
    ) -> Any:
        def step() -> None:
            before_batch()
            self.steps.step("predict")

        return super().predict_into(probs, rgb_HWC, places, corners, step, **options)


def _run(predictor: Predictor, order: Order) -> int:
    """Segment the slide as a batch of one; the exit code."""
    steps = Steps(order)
    predictor.__class__ = _Watched
    cast(_Watched, predictor).steps = steps
    config = replace(CONFIG, canvas_m=order.canvas_m, force=order.force)
    workers = InProcess(lambda _: predictor, "any", config)
    tell: Callable[[str, int, int], None] = lambda stage, done, _: steps.step("stage", stage, str(done))  # noqa: E731
    steps.watch()
    (result,) = run_batch([SlideJob(Path(order.slide))], Path(order.output), workers, lambda _: tell, lambda _: None)
    if result.status == "failed":
        sys.stderr.write(result.error + "\n")
    return int(result.status == "failed")


def serve(bundle: str) -> None:
    """Fork a run for each order, a line of JSON on stdin; answers with its process id, and once it has ended how.

    Between the two it waits for a line: until then the id stays this run's.
    """
    # Before the first network: threads of a parent are none of a forked child.
    torch.set_num_threads(1)
    predictor = load_predictor(bundle, CONFIG)
    for name in MODULES:
        importlib.import_module(name)
    # Drawing the preview at its full size would be most of the time of so small a run.
    preview.PANEL_PX = 64
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(2, 1)
                code = _run(predictor, Order(**json.loads(line)))
            except BaseException:  # noqa: BLE001 - nothing of a forked run may get back into this loop
                traceback.print_exc()
            finally:
                os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def line_of(order: Order) -> str:
    """The order as `serve` reads it."""
    return json.dumps(asdict(order)) + "\n"


if __name__ == "__main__":
    serve(sys.argv[1])
