"""Whether the slide that is shown is the file that was segmented."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from pipeline.viewing.viewer.results import Result
from wsi.errors import SlideError
from wsi.slide import slide_digest, slide_stamp

log = logging.getLogger(__name__)


async def in_daemon(work: Callable[[], bool | None]) -> bool | None:
    """Return the value of `work`, run on a daemon thread: reading a slide can take minutes, and exit must not wait.

    Raises the error of `work`.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bool | None] = loop.create_future()

    def deliver(value: bool | None, fault: Exception | None) -> None:
        if answer.done():
            return
        if fault is None:
            answer.set_result(value)
        else:
            answer.set_exception(fault)

    def run() -> None:
        value, fault = None, None
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - raised where the answer is awaited
            fault = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(deliver, value, fault)

    threading.Thread(target=run, name="digest", daemon=True).start()
    return await answer


def is_segmented_slide(result: Result) -> bool | None:
    """Return whether the slide's file has the bytes that were segmented; None if it cannot be read."""
    try:
        stamp = result.run.slide.stamp
        if stamp and slide_stamp(result.slide) == stamp:
            return True
        same = slide_digest(result.slide) == result.run.identity.slide
    except SlideError as error:
        log.error("%s: %s", result.name, error)
        return None
    if not same:
        log.warning(
            "%s: is not the file that was segmented: its bytes differ; pass --slide with the right one, or segment "
            "this one", result.slide.name
        )  # fmt: skip
    return same
