"""Which processes of a cluster can take work; they come and go while slides are segmented."""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import suppress
from typing import Any

from distributed import Client

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a cluster may be without a process before that is said."""

LOOK_S = 5.0
"""Between two looks at which processes a cluster has, and how long one may take."""


class Crew:
    """The processes of a cluster that can take work: all, or from the first one with a GPU on, those that have one."""

    def __init__(self, client: Client, *, gpu: bool) -> None:
        self.resources: dict[str, float] = {}
        """What tasks ask for."""
        self._client = client
        self._gpu = gpu
        self._lock = threading.Lock()
        self._able: list[str] = []
        self._looked = -math.inf
        self._none_since: float | None = None
        self._told = False

    def able(self, *, now: bool = False) -> list[str]:
        """Their addresses, as of a few seconds ago; says so where there are none for a while, and when there are again.

        Threads may call it at the same time.
        """
        with self._lock:
            if (now or time.monotonic() - self._looked > LOOK_S) and self._client.status == "running":
                with suppress(OSError):  # one that does not answer in time, too
                    self._look()
                self._looked = time.monotonic()
            return self._able

    def _look(self) -> None:
        scheduler: Any = self._client.scheduler
        workers = self._client.sync(scheduler.identity, n_workers=-1, callback_timeout=LOOK_S)["workers"]
        if self._gpu and any("GPU" in info["resources"] for info in workers.values()):
            self.resources = {"GPU": 1}
        asked = self.resources.items()
        self._able = [
            address
            for address, info in workers.items()
            if all(info["resources"].get(name, 0) >= amount for name, amount in asked)
        ]
        if self._able:
            if self._told:
                log.warning("the cluster has a process again; going on")
            self._none_since, self._told = None, False
            return
        self._none_since = self._none_since or time.monotonic()
        if not self._told and time.monotonic() - self._none_since >= PATIENCE_S:
            log.warning("the cluster has no process%s; waiting for one", " with a GPU" if self.resources else "")
            self._told = True
