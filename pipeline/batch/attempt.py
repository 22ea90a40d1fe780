"""One attempt at a slide, and what its outcome means for the batch."""

from __future__ import annotations

import errno
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from models.errors import ModelError, reason_of
from pipeline.errors import SHORTAGE_HELP, Cancelled, LockedError, OtherResultError, WorkerCrashedError, is_transient
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from wsi.errors import SlideError, SlideNotFoundError, WsiSegmentError, shortage, with_causes

log = logging.getLogger(__name__)

End = Literal["final", "transient", "locked"]


@dataclass(frozen=True)
class Attempt:
    """The outcome of one attempt at a slide."""

    result: SlideResult
    end: End = "final"
    """"transient": the batch retries the slide later. "locked": another run is working on the slide."""
    lasting: bool = False
    """Whether the slide itself caused the failure, so the next attempt would fail in the same way."""
    trace: str = ""
    """Traceback of an unexpected error; empty for an error whose message explains it."""


RunAttempt = Callable[[SlideJob, Callable[[], Attempt]], Attempt]
"""Runs one attempt: called on the attempt's own thread with the job and the function that makes the attempt."""


def attempt_slide(job: SlideJob, segment: Callable[[], SlideResult]) -> Attempt:
    """Call `segment` and return its outcome. Raises Cancelled; every other exception becomes a failed result."""
    start = time.perf_counter()
    try:
        return Attempt(segment())
    except Cancelled:
        raise
    except Exception as error:
        log.debug("%s failed", job.path, exc_info=True)
        result = SlideResult(
            job.result_name,
            "failed",
            time.perf_counter() - start,
            error=failure(job, error),
            refused=isinstance(error, OtherResultError),
        )
        if isinstance(error, LockedError):
            return Attempt(result, "locked")
        trace = "" if isinstance(error, WsiSegmentError) else "".join(traceback.format_exception(error))
        return Attempt(result, "transient" if is_transient(error) else "final", is_lasting(error), trace)


def failure(job: SlideJob, error: Exception) -> str:
    """Return the text of a slide's failure. Messages of the project's own errors already name the file."""
    if isinstance(error, WsiSegmentError):
        return str(error)
    if what := shortage(error):
        return f"{job.path.name}: {what} ({reason_of(error)}); {SHORTAGE_HELP[what]}"
    return (
        f"{job.path.name}: {type(error).__name__}: {error}; run again with --retry-failed -vv and report what it prints"
    )


def is_lasting(error: Exception) -> bool:
    """Return whether the slide caused this error, so that only another file, setting, model or version can help.

    Lasting errors are an unreadable slide, an unusable pixel size, a crash of the process that read the slide, and an
    unexpected exception. An error of the machine, the cluster, the model or the output folder is not lasting: somebody
    can repair those without changing the slide. Too little memory, threads or file handles are errors of the machine.
    """
    if is_transient(error) or shortage(error) or isinstance(error, SlideNotFoundError):
        return False
    if any(_is_of_the_machine(one) for one in with_causes(error)):
        return False
    return isinstance(error, (SlideError, WorkerCrashedError)) or not isinstance(error, WsiSegmentError)


def _is_of_the_machine(error: BaseException) -> bool:
    if isinstance(error, ModelError):
        return True
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
