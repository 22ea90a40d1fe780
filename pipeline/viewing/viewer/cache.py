"""Answers kept in memory, by how many bytes they take."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable


class ByteCache:
    """The answers that were asked for last, as many as fit into `limit` bytes. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.held = 0
        """Bytes that are kept now."""

    def peek(self, key: Hashable) -> bytes | None:
        """The answer to `key` where it is kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, answer: bytes) -> None:
        """Keep an answer, and drop what was not asked for longest."""
        with self._lock:
            self.held += len(answer) - len(self._kept.pop(key, b""))
            self._kept[key] = answer
            while self.held > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self.held -= len(dropped)
