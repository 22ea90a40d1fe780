"""Threads that do what requests ask for, while the server goes on answering others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from starlette.exceptions import HTTPException
from starlette.requests import Request


class RequestThreads:
    """Always the same threads, and the requests that wait for one."""

    def __init__(self, name: str, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._turns = asyncio.Semaphore(count)

    async def run(self, request: Request, work: Callable[[], bytes | None]) -> bytes | None:
        """What `work` returns, from one of the threads. Raises what it raises, and HTTPException where nobody waits."""
        async with self._turns:
            # A page that moved on has given up the tiles that still waited for their turn.
            if await request.is_disconnected():
                raise HTTPException(404)
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def shutdown(self) -> None:
        """Wait for what is at work; what has not begun is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)
