"""Drive Debian's Chromium with Playwright: fixtures for tests of pages, and checks of a page."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Browser, Locator, Page, Route

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-quic",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOCAL_SCHEMES = ("file", "data", "blob", "about")
TIMEOUT_MS = 15_000
CAPTURES = 5


def chromium() -> str | None:
    """Return the browser's program from WSI_SEGMENT_CHROMIUM or the path, or None if it is not installed."""
    return os.environ.get("WSI_SEGMENT_CHROMIUM") or next((found for n in NAMES if (found := shutil.which(n))), None)


# One browser per module: while Playwright runs, no other test of the session could run an asyncio loop in this thread.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield a headless browser whose own network services are off."""
    program = chromium()
    if program is None:
        pytest.skip("no Chromium: install the Debian package chromium, or set WSI_SEGMENT_CHROMIUM to its program")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Yield a `watched_page`."""
    with watched_page(browser) as opened:
        yield opened


@contextmanager
def watched_page(browser: Browser, *, width: int = 1280, height: int = 900, **options: Any) -> Iterator[Page]:
    """Yield an empty page in a context of its own, with Playwright's `options` of a context.

    Raises AssertionError at the end if the page logged an error or contacted another machine.
    """
    with _page_and_faults(browser, width, height, **options) as (opened, faults):
        yield opened
    assert not faults, "\n".join(faults)


@contextmanager
def failing_page(browser: Browser) -> Iterator[Page]:
    """Yield an empty page in a context of its own, whose errors are expected: the test lets its requests fail.

    It has a route from the start. Chromium applies the first route of a page to later requests with a delay, so that a
    request right after it could escape.
    """
    with _page_and_faults(browser, 1280, 900) as (opened, _):
        yield opened


@contextmanager
def _page_and_faults(browser: Browser, width: int, height: int, **options: Any) -> Iterator[tuple[Page, list[str]]]:
    with browser.new_context(viewport={"width": width, "height": height}, **options) as context:
        opened = context.new_page()
        opened.set_default_timeout(TIMEOUT_MS)
        yield opened, watch(opened)


def audited_page(browser: Browser, scheme: str, **options: Any) -> AbstractContextManager[Page]:
    """Return a `watched_page` in a color scheme, "light" or "dark", on which `axe_findings` works."""
    # Axe is injected as a script, which the content policy of our pages forbids.
    return watched_page(browser, color_scheme=scheme, bypass_csp=True, **options)


def watch(page: Page) -> list[str]:
    """Block requests to other machines. Return the list to which each fault will be added."""
    faults: list[str] = []

    def decide(route: Route) -> None:
        if is_local(route.request.url):
            route.continue_()
        else:
            faults.append(f"asked for {route.request.url}")
            route.abort()

    # Local requests do not go through Python, because that would slow down every tile.
    page.route(re.compile(r"^(?!file:|data:|blob:|https?://127\.0\.0\.1[:/])"), decide)
    page.on("websocket", lambda socket: None if is_local(socket.url) else faults.append(f"opened {socket.url}"))
    page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
    page.on("console", lambda m: faults.append(f"{m.type}: {m.text}") if m.type == "error" else None)
    return faults


def until(page: Page, condition: str, *, seconds: float = 20) -> None:
    """Wait until the condition holds. Playwright's own way needs `eval`, which the page's policy forbids."""
    for _ in range(int(seconds * 20)):
        if page.evaluate(f"() => Boolean({condition})"):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"timed out while waiting for {condition}")


def is_local(url: str) -> bool:
    """Return whether a URL stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme in LOCAL_SCHEMES or parts.hostname == "127.0.0.1"


def screenshot(page: Page, name: str, folder: Path, *, whole: bool = True) -> Path:
    """Save the page as `name`.png in the folder WSI_SEGMENT_SCREENSHOTS, or in `folder` if that is not set."""
    path = Path(os.environ.get("WSI_SEGMENT_SCREENSHOTS") or folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(capture(page, full_page=whole))
    return path


def capture(target: Page | Locator, **options: Any) -> bytes:
    """Return the PNG of a page or an element, with Playwright's `options` of a screenshot.

    Chromium sometimes refuses the first capture after its start, and takes a later one
    (github.com/MarketSquare/robotframework-browser/issues/5237); on a busy machine, it can refuse twice. Only this
    error is retried, after a pause, for at most `CAPTURES` attempts.
    """
    from playwright.sync_api import Error

    for _ in range(CAPTURES - 1):
        try:
            return target.screenshot(**options)
        except Error as refusal:
            if "Unable to capture screenshot" not in str(refusal):
                raise
        time.sleep(0.5)
    return target.screenshot(**options)


def axe_findings(page: Page) -> list[str]:
    """Return axe's serious and critical findings on the page, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [
        f"{v['impact']} {v['id']}: {node['html'][:160]} ({node.get('failureSummary', '')})"
        for v in violations
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]
