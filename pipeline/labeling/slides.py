"""The slides of a labeling session: opened one after the other in the background."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.files import printable_name
from pipeline.labeling.events import FolderStarted, Place, SlideAdded
from pipeline.labeling.patches import SlidePatches, round_robin, shuffled
from wsi.errors import SlideError, WsiSegmentError
from wsi.slide import open_slide, slide_digest, slide_stamp
from wsi.tissue import find_tissue

log = logging.getLogger(__name__)

MOST_OPEN = 8
"""Slides whose files stay open. Each has a handle for every thread. To open one again takes milliseconds."""


@dataclass(frozen=True)
class SlideFile:
    """A slide to label."""

    path: Path
    patient: str | None = None
    """None stands for the patient that the labels folder knows, or else the file's name without its ending."""
    mpp: float | None = None
    """Micrometers per level-0 pixel, if the file's own value is missing or wrong."""

    def added(self, digest: str, stamp: str, known: SlideAdded | None) -> SlideAdded:
        """Return the event of this slide. `known` is the labels folder's event of the same digest."""
        patient = self.patient or (self.path.stem if known is None else known.patient)
        return SlideAdded(digest=digest, stamp=stamp, name=self.path.name, patient=patient)


@dataclass(frozen=True)
class ReadySlide:
    """An opened slide."""

    added: SlideAdded
    title: str
    """Its file name, with folders if another slide of the session has the same file name."""
    patches: SlidePatches
    """Read their pixels inside `Slides.reading`."""
    order: Sequence[Place]
    """Its patches on tissue, in the random order."""
    thumbnail_HWC: NDArray[np.uint8]


class Slides:
    """The slides of a session. Threads may share it. Call `close` last."""

    def __init__(self, files: Sequence[SlideFile], settings: FolderStarted, known: Sequence[SlideAdded]) -> None:
        """`known` are the slides of earlier sessions, one per digest.

        The digest of an unchanged file is not computed again, unless several slides have its stamp.
        """
        self._settings = settings
        stamps = Counter(one.stamp for one in known)
        self._digests = {one.stamp: one.digest for one in known if stamps[one.stamp] == 1}
        self._known = {one.digest: one for one in known}
        self._opened_titles: dict[str, str] = {}  # by digest
        self._recent: OrderedDict[str, ReadySlide] = OrderedDict()  # by digest, the least recently used one first
        self._users: Counter[str] = Counter()  # threads that read a slide now, by digest
        self._lock = threading.Lock()
        # Hundreds of files can have the same name.
        self._stamp = cache(_stamp_or_none)
        self._files = sorted(files, key=lambda file: (file.path.name, str(file.path)))
        self._titles = _titles([file.path for file in self._files])
        # One thread: opening slides is bound by the disk, and the page needs the processor.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slides")
        self._ready: list[Future[ReadySlide | None]] = [self._thread.submit(self._open, file) for file in self._files]

    def when_opened(self, call: Callable[[], None]) -> None:
        """Call this after each slide that is opened, on any thread."""
        for future in self._ready:
            future.add_done_callback(lambda _: call())

    @property
    def count(self) -> int:
        """Return the number of slides."""
        return len(self._files)

    def ready(self) -> list[ReadySlide]:
        """Return the slides that are open now."""
        found = [future.result() for future in self._ready if future.done() and not future.cancelled()]
        return [one for one in found if one is not None]

    def wait(self) -> None:
        """Wait until a slide is open, or until none is left to open."""
        while not self.ready() and (opened := self.opened()) < self.count:
            self.wait_for_more(opened)

    def wait_for_more(self, opened: int) -> None:
        """Wait until `opened()` is larger than this. Returns at once if no slide is left to open."""
        pending = [future for future in self._ready if not future.done()]
        if self.opened() == opened:
            futures.wait(pending, return_when=futures.FIRST_COMPLETED)

    def opened(self) -> int:
        """Return how many slides have been opened, or could not be."""
        return sum(future.done() for future in self._ready)

    def open_places(self) -> Iterator[Place]:
        """Yield the patches of the slides that are open now: random in each slide, one slide after the other."""
        return round_robin([one.order for one in self.ready()])

    def of(self, place: Place) -> ReadySlide | None:
        """Return the open slide of a patch, or None if the session does not have it."""
        return next((one for one in self.ready() if one.added.digest == place.slide), None)

    def pixels(self, places: Sequence[Place]) -> NDArray[np.uint8]:
        """Return patches of open slides as rgb_NHWC. Raises KeyError for a patch of another slide."""
        return np.stack([self._pixels(place) for place in places])

    def _pixels(self, place: Place) -> NDArray[np.uint8]:
        ready = self._of(place)
        with self.reading(ready):
            return ready.patches.pixels(place)

    def _of(self, place: Place) -> ReadySlide:
        found = self.of(place)
        if found is None:
            raise KeyError(place)
        return found

    @contextmanager
    def reading(self, ready: ReadySlide) -> Iterator[None]:
        """Keep the files of a slide open while its pixels are read. Closes those of the least recently used slides."""
        digest = ready.added.digest
        with self._lock:
            self._recent[digest] = ready
            self._recent.move_to_end(digest)
            self._users[digest] += 1
            self._close_unused()
        try:
            yield
        finally:
            with self._lock:
                self._users[digest] -= 1

    def _close_unused(self) -> None:
        idle = [digest for digest in self._recent if not self._users[digest]]
        for digest in idle[: max(0, len(self._recent) - MOST_OPEN)]:
            self._recent.pop(digest).patches.close()

    def _open(self, file: SlideFile) -> ReadySlide | None:
        try:
            return self._opened(file)
        except (WsiSegmentError, OSError, MemoryError) as error:
            log.warning("left out: %s", error)
            return None

    def _opened(self, file: SlideFile) -> ReadySlide | None:
        """Return the slide, or None if another file of the session is the same slide."""
        stamp = slide_stamp(file.path)
        known = None if self._has_twin(file, stamp) else self._digests.get(stamp)
        digest = known or slide_digest(file.path)
        if digest in self._opened_titles:
            # Otherwise the labels of one patch would belong to two names and patients.
            log.warning(
                "%s is the same slide as %s, so it is skipped", self._titles[file.path], self._opened_titles[digest]
            )
            return None
        # Its handles are closed at the end; a read opens new ones. A session can have hundreds of slides.
        with open_slide(file.path, file.mpp) as slide:
            patches = SlidePatches(slide, digest, self._settings.mpp, self._settings.side)
            order = shuffled(patches.on_tissue(find_tissue(slide)), self._settings.seed)
            added = file.added(digest, stamp, self._known.get(digest))
            ready = ReadySlide(added, self._titles[file.path], patches, order, patches.thumbnail())
        self._opened_titles[digest] = ready.title
        return ready

    def _has_twin(self, file: SlideFile, stamp: str) -> bool:
        """Return whether another file of the session has this stamp, which does not contain the folder."""
        namesakes = [other.path for other in self._files if other.path.name == file.path.name and other is not file]
        return any(self._stamp(path) == stamp for path in namesakes)

    def cancel(self) -> None:
        """Open no further slide. Those that wait for one get no patches of it."""
        for future in self._ready:
            future.cancel()

    def close(self) -> None:
        """Close every slide. A slide that is being opened is waited for."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for one in self.ready():
            one.patches.close()


def _stamp_or_none(path: Path) -> str | None:
    try:
        return slide_stamp(path)
    except SlideError:  # reported when this slide is opened
        return None


def _titles(paths: Sequence[Path]) -> dict[Path, str]:
    counts = Counter(path.name for path in paths)
    titles = {path: path.name for path in paths}
    repeated = [path for path in paths if counts[path.name] > 1]
    if repeated:
        places = {path: Path(os.path.abspath(path)) for path in repeated}  # noqa: PTH100 - Path.absolute keeps ".."
        common = os.path.commonpath([place.parent for place in places.values()])
        titles |= {path: place.relative_to(common).as_posix() for path, place in places.items()}
    return {path: printable_name(title) for path, title in titles.items()}
