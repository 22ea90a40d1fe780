"""The coarse zoom levels of a slide that stores none: a thread reads the slide, and the part already read is shown."""

from __future__ import annotations

import logging
import threading

import numpy as np
from PIL import Image

from pipeline.viewing.viewer.slide_tiles import SlideTiles, jpeg
from wsi.box import Box
from wsi.errors import SlideError

log = logging.getLogger(__name__)

UNREAD = 208
"""Gray of the part that is not read yet: darker than glass, and different from tissue."""


class Overview:
    """A whole slide at one zoom level, the source of the coarser ones. Threads may share it. Call `close` last."""

    def __init__(self, tiles: SlideTiles, level: int, name: str) -> None:
        self._tiles, self._level, self._name = tiles, level, name
        width, height = tiles.size_z(level)
        self._rgb_HWC = np.full((height, width, 3), UNREAD, np.uint8)
        self._ended = threading.Event()
        self.share = 0.0
        """Share of the slide that has been read."""
        self._thread = threading.Thread(target=self._read, name="overview", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Return whether reading stopped before the end."""
        return not self._thread.is_alive() and self.share < 1

    def jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """Return a tile of the overview's or a coarser level, as far as it is read; None if there is no such tile."""
        box_z = self._tiles.box_z(level, column, row)
        if box_z is None or level < self._level:
            return None
        factor = 2 ** (level - self._level)
        part_HWC = self._rgb_HWC[box_z.y * factor : box_z.bottom * factor, box_z.x * factor : box_z.right * factor]
        return jpeg(Image.fromarray(part_HWC).reduce(factor))

    def close(self) -> None:
        """Stop reading and wait for the thread, so that the slide can be closed."""
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        pieces_z = list(self._tiles.pieces(self._level, Box(0, 0, *self._tiles.size_z(self._level))))
        try:
            for done, box_z in enumerate(pieces_z, start=1):
                if self._ended.is_set():
                    return
                part_HWC = self._tiles.pixels(self._level, box_z)
                self._rgb_HWC[box_z.y : box_z.bottom, box_z.x : box_z.right] = part_HWC
                self.share = done / len(pieces_z)
        except (SlideError, OSError, MemoryError) as error:
            log.error("%s: the overview cannot be read: %s", self._name, str(error) or type(error).__name__)
