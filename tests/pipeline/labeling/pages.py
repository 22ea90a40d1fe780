"""The page of wsi-label in a browser: serve it, press keys, and read what it saved."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from pipeline.labeling.app import make_app
from pipeline.labeling.desk import Desk
from pipeline.labeling.events import Labeled, Undone
from pipeline.labeling.store import EventStore
from tests.browser import until
from tests.local_server import serving_app

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Page, Route


@contextmanager
def serving(at: Desk, port: int = 0, seconds: float = 0) -> Iterator[str]:
    """Serve a desk at a port, or at a free one for 0; yield the address. Each answer takes this many seconds longer."""
    app = make_app(at)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(seconds)
        await app(scope, receive, send)

    with serving_app(slow, port) as used:
        yield f"http://127.0.0.1:{used}/"


def ready(page: Page) -> None:
    saved = "!wsiLabel.orders.pending.length && !wsiLabel.orders.undoing"
    until(page, f"{saved} && document.querySelector('#stage .patch')?.complete")


def shown(page: Page) -> str:
    """Return the id of the patch that is shown."""
    return str(page.evaluate("() => wsiLabel.single.patch?.id"))


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
        ready(page)


def saved(folder: Path) -> list[Any]:
    """Return the labels and undos in the file."""
    with EventStore(folder / "labels.sqlite") as store:
        return [one.event for one in store.read() if isinstance(one.event, (Labeled, Undone))]


def held(page: Page) -> list[Route]:
    """Hold the labels that the page sends from now on. Return the list to which their requests are added."""
    requests: list[Route] = []
    page.route("**/labels", lambda route: requests.append(route))  # noqa: PLW0108 - Playwright needs a function of Python
    return requests


def lose_answers(page: Page, path: str) -> None:
    """Lose the answer of the next request to this path, after the server has done what it asks."""

    def lose(route: Route) -> None:
        page.request.fetch(
            route.request.url, method="POST", headers=route.request.all_headers(), data=route.request.post_data
        )
        route.abort()

    page.route(f"**{path}", lose, times=1)
