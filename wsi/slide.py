"""Open a slide, describe it, and read its pixels through one of the readers."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from wsi.agreement import tiffslide_agrees
from wsi.box import Box
from wsi.errors import SlideFormatError, SlideNotFoundError, SlideReadError, shortage
from wsi.levels import levels_of_one_shape
from wsi.paths import kind_of
from wsi.pixel_size import MppSource, check_extent, find_mpp
from wsi.readers import READERS, BackendName, Reader
from wsi.slide_files import slide_files
from wsi.tiff_checks import check_layout, picture_sizes

log = logging.getLogger(__name__)

Backend = str
"""A key of `wsi.readers.READERS`, or "auto"."""

BACKGROUND = 255
"""Value of every channel outside the slide and in regions that cannot be read: white, like glass."""

UNREADABLE_CELL = 256
"""Side, in level pixels, of the smallest region that is abandoned after a read error."""


SHOWN_UNREADABLE = 5
"""Parts of a slide that cannot be read and are logged as warnings."""


@dataclass(frozen=True)
class SlideInfo:
    """Facts about a slide that need no pixels. Immutable and picklable; contains no patient data."""

    path: Path
    backend: BackendName
    """The reader of the pixels."""
    vendor: str
    level_sizes: tuple[tuple[int, int], ...]
    """(width, height) of every level, the largest first."""
    mpp: float
    """Micrometers per level-0 pixel."""
    mpp_source: MppSource
    bounds_l0: Box
    """The scanned part: openslide.bounds-* if the file has all four, else all of level 0. QuPath shows only this box,
    with its origin at the box's corner."""
    warnings: tuple[str, ...] = ()

    @property
    def size_l0(self) -> tuple[int, int]:
        """Return (width, height) of level 0."""
        return self.level_sizes[0]

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Return the level-0 pixels per pixel of each level.

        Sides of levels are rounded to whole pixels, so this is the ratio of the longer sides: with it, both ends of a
        level lie within one of its pixels from the slide's. With the mean over both axes, which OpenSlide uses, the far
        end of a strip would be off by many pixels.
        """
        longer = int(np.argmax(self.size_l0))
        return tuple(self.size_l0[longer] / size[longer] for size in self.level_sizes)


class Pixels(NamedTuple):
    """The pixels of a box, and the parts of the box that could not be read. Those are white."""

    rgb_HWC: NDArray[np.uint8]
    unreadable_lv: tuple[Box, ...]


class Slide:
    """An open slide. Threads may share it: each has its own handle.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, info: SlideInfo) -> None:
        self.info = info
        self._local = threading.local()
        self._readers: set[Reader] = set()
        self._lock = threading.Lock()
        self._unreadable = 0

    def read(self, level: int, box_lv: Box) -> Pixels:
        """Read a box of a level; parts outside the level are white.

        After a read error the box is split and read again, down to parts of `UNREADABLE_CELL`. A part that still fails
        becomes white and is listed in the result. Raises the reader's error if the machine runs out of memory,
        threads or file handles (`wsi.errors.shortage`).
        """
        rgb_HWC = np.full((box_lv.height, box_lv.width, 3), BACKGROUND, np.uint8)
        inside_lv = box_lv.intersect(Box(0, 0, *self.info.level_sizes[level]))
        unreadable: list[Box] = []
        if inside_lv.width and inside_lv.height:
            self._fill(level, inside_lv, rgb_HWC, box_lv, unreadable)
        return Pixels(rgb_HWC, tuple(unreadable))

    def _fill(self, level: int, part_lv: Box, rgb_HWC: NDArray[np.uint8], box_lv: Box, unreadable: list[Box]) -> None:
        try:
            pixels_HWC = self._reader().read(level, part_lv)
        except Exception as error:
            if shortage(error, decoding=True):
                raise
            # After its first error an OpenSlide handle fails at every read.
            self._drop_reader()
            if max(part_lv.width, part_lv.height) <= UNREADABLE_CELL:
                self._log_unreadable(level, part_lv, error)
                unreadable.append(part_lv)
                return
            for quarter_lv in _quarters(part_lv):
                self._fill(level, quarter_lv, rgb_HWC, box_lv, unreadable)
            return
        x, y = part_lv.x - box_lv.x, part_lv.y - box_lv.y
        rgb_HWC[y : y + part_lv.height, x : x + part_lv.width] = pixels_HWC

    def _log_unreadable(self, level: int, part_lv: Box, error: Exception) -> None:
        """Log the first unreadable parts as warnings. A truncated slide has thousands."""
        with self._lock:
            self._unreadable += 1
            number = self._unreadable
        name, urgency = self.info.path.name, logging.WARNING if number <= SHOWN_UNREADABLE else logging.DEBUG
        log.log(urgency, "%s: cannot read %s of level %d: %s", name, part_lv, level, error)
        if number == SHOWN_UNREADABLE:
            log.warning("%s: further parts that cannot be read are counted and not logged", name)

    def _reader(self) -> Reader:
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            reader = READERS[self.info.backend](self.info.path)
            self._local.reader = reader
            with self._lock:
                self._readers.add(reader)
        return reader

    def _drop_reader(self) -> None:
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is not None:
            self._local.reader = None
            with self._lock:
                self._readers.discard(reader)
            reader.close()

    def close(self) -> None:
        """Close the handles of all threads. A later read opens a new one."""
        with self._lock:
            readers, self._readers = self._readers, set()
            self._local = threading.local()
        for reader in readers:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_slide(path: Path, mpp: float | None = None, backend: Backend = "auto") -> Slide:
    """Open a slide with the reader that `backend` names.

    "auto" uses the first of `READERS` that can open the file. If that is OpenSlide and `tiffslide_agrees`, the pixels
    come from tiffslide, which is several times faster, and the properties from OpenSlide. `SlideInfo.backend` names the
    reader of the pixels.

    `mpp` (micrometers per level-0 pixel) overrides the file. Without it `find_mpp` takes the file's own value, then its
    TIFF resolution, then a guess from the objective power; a guess adds a warning to `SlideInfo.warnings`.

    The first level whose shape differs from the slide's, or that has the size of a picture of the label or of the whole
    glass (see `picture_sizes`), and all later levels are left out, with a warning. If OpenSlide opens the slide, only
    pictures in tiles count, because it takes no other image as a level.

    Raises SlideNotFoundError, SlideFormatError if no reader can open the file, its pixels would be wrong (see
    `check_layout`) or level 0 is such a picture, SlideReadError if the path cannot be examined or no pixel can be
    decoded, ResolutionError, or ValueError for an unknown backend.
    """
    if backend != "auto" and backend not in READERS:
        raise ValueError(f"unknown backend {backend!r}; use auto, {', '.join(READERS)}")
    with _reading(path):
        _check_file(path)
    name, reader = _open_reader(path, backend)
    with closing(reader):
        properties, all_sizes = reader.properties, _checked_sizes(path, reader)
        with _reading(path):
            check_layout(path, all_sizes)
            # OpenSlide takes no image in strips as a level, so a level of that size is another image.
            pictures = picture_sizes(path, in_strips=name != "openslide")
        if backend == "auto" and name == "openslide" and _tiffslide_agrees(path, reader):
            name = "tiffslide"
    level_sizes, left_out = _usable_levels(path, all_sizes, pictures)
    if reason := _probe(path, name, level_sizes):
        raise SlideReadError(
            f"{path.name}: opens, but its pixels cannot be decoded ({reason}); {_what_helps(path, name, backend)}"
        )
    mpp, source, warnings = find_mpp(path, properties, level_sizes[0], mpp)
    bounds_l0 = _find_bounds(properties, level_sizes[0])
    check_extent(path, bounds_l0, mpp)
    info = SlideInfo(
        path=path,
        backend=name,
        vendor=properties.get("openslide.vendor", "unknown"),
        level_sizes=tuple((int(width), int(height)) for width, height in level_sizes),
        mpp=mpp,
        mpp_source=source,
        bounds_l0=bounds_l0,
        warnings=(*left_out, *warnings),
    )
    return Slide(info)


def slide_digest(path: Path) -> str:
    """Return the SHA-256 of the slide's file as hexadecimal digits.

    For MIRAX the digest covers the files of its folder too. For DICOM it covers the other files of the same series in
    the same folder, which are other levels of the slide. For Hamamatsu's .vms and .vmu it covers the files that the
    named file lists, as far as they exist.

    Raises SlideNotFoundError, or SlideReadError if a file cannot be read.
    """
    with _reading(path):
        _check_file(path)
        digests = [_file_digest(p) for p in slide_files(path) if kind_of(p) == "file"]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def slide_stamp(path: Path) -> str:
    """Return a digest of the sizes and modification times of the files that `slide_digest` reads.

    The files are not read. As long as the stamp is the same, nobody has written to them or added a missing one. It does
    not reveal the times, which may be those of the scan. Raises the errors of `slide_digest`.
    """
    with _reading(path):
        _check_file(path)
        facts = [
            (p.name, p.stat().st_size, p.stat().st_mtime_ns) if kind_of(p) == "file" else (p.name, "missing")
            for p in slide_files(path)
        ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise SlideReadError for an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise SlideReadError(
            f"{path.name}: cannot be read: {error.strerror or error}; check its permissions and its disk"
        ) from error


def _check_file(path: Path) -> None:
    kind = kind_of(path)
    if kind == "folder":
        raise SlideNotFoundError(f"{path.name}: is a folder ({path}); pass the path of a slide file")
    if kind != "file":
        raise SlideNotFoundError(f"{path.name}: no such file at {path}; check the path")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_reader(path: Path, backend: Backend) -> tuple[BackendName, Reader]:
    names = tuple(READERS) if backend == "auto" else (backend,)
    reasons = []
    for name in names:
        try:
            return name, READERS[name](path)
        except Exception as error:
            if shortage(error, decoding=True):
                raise
            reasons.append(f"{name}: {str(error) or type(error).__name__}")
    raise SlideFormatError(
        f"{path.name}: cannot be opened as a slide ({'; '.join(reasons)}); check that the file is complete and in a "
        f"format that {' or '.join(names)} reads"
    )


def _checked_sizes(path: Path, reader: Reader) -> tuple[tuple[int, int], ...]:
    sizes = reader.level_sizes
    if not sizes or min(min(size) for size in sizes) < 1:
        raise SlideFormatError(
            f"{path.name}: a level has no pixels (sizes: {', '.join(f'{w}×{h}' for w, h in sizes) or 'none'}); "
            f"copy or scan the slide again"
        )
    return sizes


def _usable_levels(
    path: Path, sizes: tuple[tuple[int, int], ...], pictures: Collection[tuple[int, int]]
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """Return the sizes of the levels before the first one that is not a smaller image of the slide, and a warning."""
    if sizes[0] in pictures:
        raise SlideFormatError(
            f"{path.name}: its first image is a label or macro image, or has the size of one; save "
            f"the slide without that image"
        )
    used = next((level for level, size in enumerate(sizes) if size in pictures), len(sizes))
    reason = "has the size of a label or macro image"
    (width_l0, height_l0), alike = sizes[0], levels_of_one_shape(sizes)
    if alike <= used:
        used, reason = alike, f"differs in shape from the slide ({width_l0}×{height_l0} px)"
    if used == len(sizes):
        return sizes, ()
    width, height = sizes[used]
    warning = f"level {used} ({width}×{height} px) {reason}; levels from {used} on are not used"
    return sizes[:used], (warning,)


def _tiffslide_agrees(path: Path, reader: Reader) -> bool:
    try:
        return tiffslide_agrees(path, reader)
    except Exception as error:
        if shortage(error, decoding=True):
            raise
        log.debug("%s: read by OpenSlide, because tiffslide fails: %s", path.name, error)
        return False


def _probe(path: Path, name: BackendName, level_sizes: tuple[tuple[int, int], ...]) -> str | None:
    """Decode one pixel at a few places of the coarsest level. Return the last error if all of them fail."""
    level = len(level_sizes) - 1
    width, height = level_sizes[level]
    places = ((width // 2, height // 2), (0, 0), (width - 1, height - 1), (width - 1, 0), (0, height - 1))
    reason = None
    for x, y in places:
        try:
            # A new reader each time: after its first error an OpenSlide handle fails at every read.
            with closing(READERS[name](path)) as reader:
                reader.read(level, Box(x, y, 1, 1))
        except Exception as error:
            if shortage(error, decoding=True):
                raise
            reason = str(error) or type(error).__name__
        else:
            return None
    return reason


def _what_helps(path: Path, name: BackendName, backend: Backend) -> str:
    """Return what to do if the reader of a slide decodes none of its pixels."""
    convert = "if other programs can show the slide, convert it to 8-bit RGB; otherwise copy or scan it again"
    if backend != "auto":
        return f"pass --backend auto, or, {convert}"
    names = list(READERS)
    # Those before this one cannot open the file, or return the same pixels as this one.
    for other in names[names.index(name) + 1 :]:
        try:
            with closing(READERS[other](path)) as reader:
                level_sizes = reader.level_sizes
            if _probe(path, other, level_sizes) is None:
                return f"pass --backend {other}, which can decode them"
        except Exception as error:
            if shortage(error, decoding=True):
                raise
            log.debug("%s: %s fails too: %s", path.name, other, error)
    return convert


def _quarters(box: Box) -> list[Box]:
    """Return the parts of a box that is halved along each side longer than an unreadable cell."""
    columns = _halves(box.x, box.width)
    rows = _halves(box.y, box.height)
    return [Box(x, y, width, height) for y, height in rows for x, width in columns]


def _halves(start: int, length: int) -> list[tuple[int, int]]:
    if length <= UNREADABLE_CELL:
        return [(start, length)]
    # Cuts at multiples of the cell fall on the edges of the file's own JPEG tiles.
    middle = round((start + length / 2) / UNREADABLE_CELL) * UNREADABLE_CELL
    if not start < middle < start + length:
        middle = start + length // 2
    return [(start, middle - start), (middle, start + length - middle)]


def _find_bounds(properties: Mapping[str, str], size_l0: tuple[int, int]) -> Box:
    whole_l0 = Box(0, 0, int(size_l0[0]), int(size_l0[1]))
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{side}"]) for side in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return whole_l0
    bounds_l0 = Box(x, y, width, height).intersect(whole_l0)
    return bounds_l0 if bounds_l0.width and bounds_l0.height else whole_l0
