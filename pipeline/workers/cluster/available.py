"""Which processes of a cluster are available. Processes come and go while slides are segmented."""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import suppress
from typing import Any

from distributed import Client

log = logging.getLogger(__name__)

WARNING_S = 10.0
"""Seconds without a process after which a warning is logged."""

REFRESH_S = 5.0
"""Seconds between two queries of the cluster's processes, and the timeout of one query."""


class AvailableProcesses:
    """The processes of a cluster that take work: all of them, or only those with a GPU once there is one."""

    def __init__(self, client: Client, *, gpu: bool) -> None:
        """`gpu`: prefer processes with a GPU."""
        self.resources: dict[str, float] = {}
        """The resources that each task requests."""
        self._client = client
        self._gpu = gpu
        self._lock = threading.Lock()
        self._addresses: list[str] = []
        self._left_out: set[str] = set()
        self._refreshed = -math.inf
        self._empty_since: float | None = None
        self._warned = False

    def addresses(self, *, now: bool = False) -> list[str]:
        """Return the addresses of the processes, as of a few seconds ago or, with `now`, as of this moment.

        Processes that are left out are among them only if all others have ended.

        Logs a warning if there is no process for `WARNING_S`, and another one when a process is available again.
        Threads may call this at the same time.
        """
        with self._lock:
            if (now or time.monotonic() - self._refreshed > REFRESH_S) and self._client.status == "running":
                with suppress(OSError):  # includes timeouts
                    self._refresh()
                self._refreshed = time.monotonic()
            return [one for one in self._addresses if one not in self._left_out] or self._addresses

    def leave_out(self, address: str, reason: str) -> None:
        """Give a process no more tasks as long as there are others. `reason` completes a sentence about it."""
        with self._lock:
            if address not in self._left_out:
                self._left_out.add(address)
                log.warning("worker %s %s; the batch leaves this worker out", address, reason)

    def is_left_out(self, address: str) -> bool:
        """Return whether a process gets no more tasks as long as there are others."""
        with self._lock:
            return address in self._left_out

    def allowed(self) -> list[str] | None:
        """Return the addresses to which a task must be restricted; None if any process may run it."""
        addresses = self.addresses()
        with self._lock:
            return addresses if len(addresses) < len(self._addresses) else None

    def _refresh(self) -> None:
        scheduler: Any = self._client.scheduler
        workers = self._client.sync(scheduler.identity, n_workers=-1, callback_timeout=REFRESH_S)["workers"]
        if self._gpu and any("GPU" in info["resources"] for info in workers.values()):
            self.resources = {"GPU": 1}
        requested = self.resources.items()
        self._addresses = [
            address
            for address, info in workers.items()
            if all(info["resources"].get(name, 0) >= amount for name, amount in requested)
        ]
        if self._addresses:
            if self._warned:
                log.warning("a process of the cluster is available again; resuming")
            self._empty_since, self._warned = None, False
            return
        self._empty_since = self._empty_since or time.monotonic()
        if not self._warned and time.monotonic() - self._empty_since >= WARNING_S:
            log.warning("the cluster has no process%s; waiting for one", " with a GPU" if self.resources else "")
            self._warned = True
