"""The page of wsi-label in a browser: serve it, press keys, and read what it saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.labeling.app import make_app
from pipeline.labeling.desk import Desk
from pipeline.labeling.events import Labeled, Undone
from pipeline.labeling.store import EventStore
from tests.browser import until
from tests.local_server import serving_app

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Page, Route


@contextmanager
def serving(at: Desk) -> Iterator[str]:
    """Serve a desk; yield the address."""
    with serving_app(make_app(at)) as port:
        yield f"http://127.0.0.1:{port}/"


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
