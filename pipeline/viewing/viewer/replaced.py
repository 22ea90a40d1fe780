"""Refuse requests for a result that was replaced, or whose slide was replaced.

If the result was replaced after wsi-view loaded it, its files no longer match the loaded record. If wsi-view was
restarted in between, it shows another result than a page that is still open. If the slide was replaced, some threads
read the earlier file and some the new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.exceptions import HTTPException
from starlette.requests import Request

from pipeline.viewing.viewer.results import Result, record_stamp, slide_file_stamp


def requested_result(request: Request, results: Mapping[str, Result]) -> Result:
    """Return the result that a request asks for.

    Raises HTTPException 404 if there is none, and 409 if the request asks for another version of it.
    """
    result = results.get(request.path_params["id"])
    if result is None:
        raise HTTPException(404)
    if request.path_params.get("version", result.version) != result.version:
        raise HTTPException(409, "The result has changed; reload the page.")
    return result


def check_current(result: Result) -> None:
    """Raise HTTPException 409 unless the result's folder has the record that was loaded, and the slide is the same."""
    if record_stamp(result.folder) != result.stamp:
        raise HTTPException(409, "The result has changed; stop wsi-view, start it again, then reload the page.")
    stamp = slide_file_stamp(result.slide)
    # If the slide cannot be found, tiles may still come from handles that are open.
    if stamp is not None and result.slide_stamp is not None and stamp != result.slide_stamp:
        raise HTTPException(409, "The slide has changed; stop wsi-view, start it again, then reload the page.")


@contextmanager
def current(result: Result) -> Iterator[None]:
    """Call `check_current` before and after the block. Its error replaces an error of the block."""
    check_current(result)
    try:
        yield
    finally:
        check_current(result)
