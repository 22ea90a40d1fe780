"""Threads that work for requests while the server answers other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from starlette.exceptions import HTTPException
from starlette.requests import Request


class RequestThreads:
    """A fixed set of threads, and the requests that wait for one."""

    def __init__(self, name: str, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._turns = asyncio.Semaphore(count)

    async def run(self, request: Request, work: Callable[[], bytes | None]) -> bytes | None:
        """Return the value of `work`, run on one of the threads. Raises HTTPException if the browser disconnects."""
        async with self._turns:
            # A page that moved on has canceled the tiles that were still waiting.
            if await request.is_disconnected():
                raise HTTPException(404)
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def shutdown(self) -> None:
        """Wait for running work and drop work that has not begun."""
        self._executor.shutdown(wait=True, cancel_futures=True)
