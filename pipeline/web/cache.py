"""A cache of responses, limited by their bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable


class ByteCache:
    """The most recently used responses, as many as fit into `limit` bytes. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.held = 0
        """Bytes in the cache."""

    def peek(self, key: Hashable) -> bytes | None:
        """Return the cached response to `key`, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, response: bytes) -> None:
        """Add a response and drop the least recently used ones."""
        with self._lock:
            self.held += len(response) - len(self._kept.pop(key, b""))
            self._kept[key] = response
            while self.held > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self.held -= len(dropped)
